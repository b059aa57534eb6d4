"""SoCo (arXiv 2502.15092): learned scores on singular values, trained end to end in three phases.

From the abstract and the reviews: W′ = U (Σ ⊙ S) Vᵀ with U, Σ, V frozen; scores decide what
survives, not the order of σ, and may exceed 1 so that survivors make up for the rest; a deviation
term d; the whole model is trained at once; KL to the dense model, a compression loss and a sparsity
loss; rapid compression, oscillation around the target, polarisation, each a preset number of steps.

The full text was not reachable. Ours are: S starts at 1 (the dense model); d is a bias of out
numbers, counted; a component below the threshold is gated out of the forward pass, so that the KL
is that of the model which would be stored, while its gradient passes a sigmoid and can bring it
back (``gate_from=3`` lets dropped components contribute until phase 3); the compression loss counts
components by that sigmoid, and a layer of more components than pay as dense in the target's count
only (in the loss it would have no gradient); the pressure's weight grows until the target is met,
then follows the share; it is no part of what Adam normalises, else the KL's steps would vanish
behind it: its gradient is added to the KL's step in units of the KL's own second moment, and
together they move a raw score by no more than the learning rate; half-way through phase 3 what
stays is settled at the exact budget, where a layer of more components than pay stays dense as it
was, and only survivors are trained on; the sparsity loss weighs as much as the KL of the moment and
is therefore part of what Adam normalises; steps, rates and thresholds. The 256 most likely tokens
of the dense model stand for all of its logits.

In plain factors (``factors=plain``, the paper's) every component of a layer costs the same. In the
smaller of both forms, which is ours and the default, the next one costs less than the last; the
compression loss then counts each at the average price of its layer's.

``basis=weight`` is the plain SVD as the abstract reads; ``basis=whitened`` are the components of
SVD-LLM, each of which costs exactly its energy in output error.
"""

from compress_core.decompose import ProjectOutputs
from compress_core.learn.soco import LearnSpectrum
from compress_core.method import Method
from compress_core.metric import OutputError, Unweighted
from compress_core.options import one_of


def soco(
    basis: str = "weight",
    phase1: int = 80,
    phase2: int = 220,
    phase3: int = 100,
    batch: int = 4,
    map: str = "softplus",
    threshold: float = 0.5,
    rate: float = 0.05,
    deviation: float = 1e-3,
    polarise: float = 1.0,
    gate_from: int = 1,
    order: str = "score",
) -> Method:
    """Scores trained on the whole model choose and rescale the components of every layer.

    Args:
        basis: "weight" (components of W) or "whitened" (of W in the metric of its inputs).
        phase1: Steps of rapid compression.
        phase2: Steps of oscillation around the target; 0 leaves the phase out.
        phase3: Steps of polarisation; 0 leaves the phase out.
        batch: Windows in a step.
        map: From parameters to scores: "softplus", "sigmoid" (scores below 2) or "relu".
        threshold: Scores below it are dropped, in (0, 1).
        rate: Learning rate of the scores.
        deviation: Learning rate of the deviation term; 0 leaves it out.
        polarise: Weight of polarisation.
        gate_from: Phase from which dropped components no longer contribute: 1 or 3.
        order: "score", or "sigma" for survivors in the order of singular values.

    Raises:
        ConfigError: A value is none of these or out of range.
    """
    owner = "method 'soco'"
    one_of(owner, "basis", basis, ("weight", "whitened"))
    one_of(owner, "map", map, ("softplus", "sigmoid", "relu"))
    one_of(owner, "order", order, ("score", "sigma"))
    return Method(
        "soco",
        "learned scores on every singular value, trained end to end",
        "2502.15092",
        weighting=OutputError() if basis == "whitened" else Unweighted(),
        decompose=ProjectOutputs(whole=True),
        learn=LearnSpectrum(
            phase1=phase1,
            phase2=phase2,
            phase3=phase3,
            batch=batch,
            map=map,  # type: ignore[arg-type]  # checked above
            threshold=threshold,
            rate=rate,
            deviation=deviation,
            polarise=polarise,
            gate_from=gate_from,
            order=order,  # type: ignore[arg-type]  # checked above
        ),
    )
