"""AdaSVD (arXiv 2502.01403): layer-adaptive shares (adaCR), then u and v updated in turn (adaComp).

From the paper: truncation as in SVD-LLM; a block's share from the cosine of its input and output; u
← W X Xᵀ v (vᵀ X Xᵀ v)⁻¹ and v ← u⁺ W by pseudo-inverses, in turn, ``sweeps`` times (1 is its best
at removals of 40 to 60 %); stack-of-batch calibration for the updates.

Holes, and how they are filled. Importance is 1 − cosine: blocks that change their input most keep
most, and mrr is 0.05 below the target, since these are the numbers of the official repository's
overview figure (the text says similarity: ``importance=cosine``). With the X that the truncation
was optimal for, both updates are no-ops, so X must be another. It is measured behind the layers
that are compressed already, layer by layer in the order of Algorithm 1, and W X is the dense
model's own output (``toward_dense=1``, by the cross moment of both inputs); ``toward_dense=0`` fits
the layer to what the dense weight makes of the compressed inputs instead, with which v ← u⁺ W holds
literally. The number of buckets is not given (as many as fit in memory). Stack-of-batch averages
only where there are more windows than buckets: of the paper's 256 windows (``--samples 256``) four
to a bucket of 64, of 64 windows nothing. The shares are clipped and scaled to meet the budget
exactly. The truncation itself uses exact statistics of the dense model, which it shares with
SVD-LLM.
"""

from compress_core.allocate.importance import Importance
from compress_core.errors import ConfigError
from compress_core.fit import Prefix
from compress_core.method import Method
from compress_core.metric import OutputError
from compress_core.options import one_of
from compress_core.refine.least_squares import Alternate


def ada_svd(
    mrr: float | None = None,
    sweeps: int = 1,
    calibration: str = "stack_of_batch",
    buckets: int = 64,
    toward_dense: float = 1.0,
    prefix: str = "layer",
    importance: str = "change",
) -> Method:
    """Shares by importance, then ``sweeps`` alternating least-squares updates of u and v.

    Args:
        mrr: Least share any block keeps; where it is not given 0.05 below the target, or half of a
            target below 0.1.
        sweeps: Updates of both factors, at least 1.
        calibration: Of the updates: "stack_of_batch" or "streaming" (exact statistics).
        buckets: Buckets of stack-of-batch; nothing is averaged unless there are more windows.
        toward_dense: Part of the dense model's outputs in what is fitted to, in [0, 1].
        prefix: Whether inputs are measured again after each "layer" or each "block".
        importance: Who keeps most: blocks of most "change" (1 − cosine of input and output) or of
            most "cosine".

    Raises:
        ConfigError: A value is out of range.
    """
    if sweeps < 1:
        raise ConfigError(
            f"sweeps must be at least 1, got {sweeps}; for adaCR alone take --method svd_llm "
            "--allocate importance"
        )
    if buckets < 1:
        raise ConfigError(f"buckets must be at least 1, got {buckets}")
    one_of("method 'ada_svd'", "calibration", calibration, ("stack_of_batch", "streaming"))
    return Method(
        "ada_svd",
        "shares by block importance, alternating updates of both factors",
        "2502.01403",
        weighting=OutputError(),
        allocate=Importance(mrr, importance),  # type: ignore[arg-type]  # it checks
        fit=Alternate(sweeps, toward_dense),
        prefix=Prefix(
            prefix,  # type: ignore[arg-type]  # it checks
            buckets if calibration == "stack_of_batch" else 0,
        ),
    )
