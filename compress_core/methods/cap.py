"""CAP (arXiv 2505.03801): robust PCA, then what to keep of both parts under one global budget.

From the paper: stage 1 splits every weight into low rank and sparse, data-free, with λ = 1/√max;
stage 2 gives every singular triple and every sparse entry a keep-probability and moves them by
policy gradient, three steps of η = 0.05 with a baseline over 5 losses and a projection onto the
budget; what is most probable stays. Where an entry is does not count as a parameter, only in bytes.

Holes, and how they are filled: ten iterations of robust PCA are what its ablation finds best, and
what they leave over belongs to the components (see ``rpca``); the first probabilities follow from
the items' energies, as parts of their layer's (see ``learn.worth``); ranking is by probability,
which starts from worth per stored number, so that a component pays for its length; every layer
keeps at least one item, and one whose items cost as much as its weight stays dense.

Ours, by name: ``policy=group`` learns one threshold per layer and part, ``policy=gradient`` ranks
by what each item's absence costs to second order; ``scale=activations`` splits W D, D the root mean
square of the inputs; ``init=activation`` counts energies in it; ``refit`` fits directions, scales
and values of what stays by least squares, on the dense model's inputs or, layer by layer, on those
behind compressed layers. With these a smaller λ (``lambda_scale=0.1``) is far better: at λ = 1/√max
entries are shrunk, and miss what the components that do not stay had of them.
"""

from compress_core.fit import Fitter, Prefix
from compress_core.learn.base import Learner
from compress_core.learn.bernoulli import EntryPolicy
from compress_core.learn.gains import GainPolicy
from compress_core.learn.group import GroupPolicy
from compress_core.method import Method
from compress_core.metric import ChannelScale, Unweighted
from compress_core.options import one_of
from compress_core.refine.masked import MaskedLeastSquares, PrefixMaskedLeastSquares
from compress_core.robust_pca import RobustPca

OWNER = "method 'cap'"


def cap(
    iterations: int = 10,
    lambda_scale: float = 1.0,
    tolerance: float = 1e-6,
    scale: str = "none",
    policy: str = "entry",
    init: str = "energy",
    steps: int = 0,
    eta: float = 0.0,
    window: int = 5,
    refit: str = "none",
) -> Method:
    """Components and entries, ranked over all layers.

    Args:
        iterations: Of robust PCA, at most.
        lambda_scale: Of λ = 1/√max(m, n); smaller leaves more to the entries.
        tolerance: Relative residual at which robust PCA stops.
        scale: What is split: "none" for the weight, "activations" for it times its inputs' scale.
        policy: "entry" as in the paper; "group" or "gradient" are ours.
        init: What items are worth at first: their "energy", or "activation" for it at the output.
        steps: Of the policy; 0 for 3 of entry, 30 of group, 128 windows of gradient.
        eta: Step size of the policy; 0 for 0.05 of entry, 0.3 of group.
        window: Losses that entry's baseline averages over.
        refit: "none", "dense" for a least-squares fit of what stays, "prefix" for one on inputs
            behind compressed layers.

    Raises:
        ConfigError: A value is none of these.
    """
    one_of(OWNER, "scale", scale, ("none", "activations"))
    one_of(OWNER, "policy", policy, ("entry", "group", "gradient"))
    one_of(OWNER, "init", init, ("energy", "activation"))
    one_of(OWNER, "refit", refit, ("none", "dense", "prefix"))
    learners: dict[str, Learner] = {
        "entry": EntryPolicy(steps or 3, eta=eta or 0.05, window=window, init=init),  # type: ignore[arg-type]  # checked above
        "group": GroupPolicy(steps or 30, eta=eta or 0.3, init=init),  # type: ignore[arg-type]
        "gradient": GainPolicy(steps or 128, init=init),  # type: ignore[arg-type]
    }
    refiners: dict[str, Fitter | None] = {
        "none": None,
        "dense": MaskedLeastSquares(),
        "prefix": PrefixMaskedLeastSquares(),
    }
    return Method(
        "cap",
        "robust PCA, what to keep of both parts learned under one budget",
        "2505.03801",
        weighting=ChannelScale() if scale == "activations" else Unweighted(),
        decompose=RobustPca(iterations, lambda_scale, tolerance),
        fit=refiners[refit],
        prefix=Prefix("layer"),
        learn=learners[policy],
    )
