"""SVD-LLM (arXiv 2403.07378): the rank-k weight with the least output error.

Deviation: the paper whitens by the Cholesky factor of H = X Xᵀ and multiplies by its inverse; we
reach the same optimum by projecting outputs (see ``decompose``), which needs neither, so nothing
is added to H when it is singular. Equality with the literal formula, where that is defined, is a
test.

``update=u`` is the paper's closed-form update: layer by layer on inputs from the compressed prefix,
the out-factor is fitted again by least squares. The published code fits it to what the dense layer
makes of those same inputs (``toward_dense=0``); fitting to the dense model's outputs is ours. The
published code uses 16 samples for it, we use all.
"""

from compress_core.fit import Prefix
from compress_core.method import Method
from compress_core.metric import OutputError
from compress_core.options import one_of
from compress_core.refine.least_squares import Alternate


def svd_llm(update: str = "none", toward_dense: float = 0.0, prefix: str = "layer") -> Method:
    """Truncates in the metric of the layer's measured inputs; uniform ranks.

    Args:
        update: "none", or "u" for the closed-form update of the out-factor.
        toward_dense: Part of the dense model's outputs in what the update is fitted to, in [0, 1].
        prefix: Whether inputs are measured again after each "layer" or each "block".

    Raises:
        ConfigError: A value is none of these.
    """
    one_of("method 'svd_llm'", "update", update, ("none", "u"))
    step = Prefix(prefix)  # type: ignore[arg-type]  # it checks
    refine = Alternate(0, toward_dense)
    return Method(
        "svd_llm",
        "least output error on calibration text",
        "2403.07378",
        weighting=OutputError(),
        fit=refine if update == "u" else None,
        prefix=step,
    )
