"""SVD-LLM, whitening only (arXiv 2403.07378): the rank-k weight with the least output error.

Deviation: the paper whitens by the Cholesky factor of H = X Xᵀ and multiplies by its inverse; we
reach the same optimum by projecting outputs (see ``decompose``), which needs neither, so nothing
is added to H when it is singular. Equality with the literal formula, where that is defined, is a
test.
"""

from compress_core.method import Method
from compress_core.whiten import OutputError


def svd_llm() -> Method:
    """Truncates in the metric of the layer's measured inputs; uniform ranks."""
    return Method(
        "svd_llm", "least output error on calibration text", "2403.07378", whiten=OutputError()
    )
