"""SVD-LLM v2 (arXiv 2503.12340): SVD-LLM with shares by module type, whitened by eigenvectors.

Its two-step SVD of H and of W U S^½ has the same optimum as v1; ours (see ``decompose``) reaches it
without either root, so what remains of v2 is its allocation (``by_type``, where the guard of the
logarithm is ours, as the paper's pseudo-code leaves it open). Its code is unreleased.
"""

from compress_core.allocate.by_type import ByType
from compress_core.method import Method
from compress_core.metric import OutputError


def svd_llm_v2() -> Method:
    """SVD-LLM whose layers of one type share that type's removal by their truncation loss."""
    return Method(
        "svd_llm_v2",
        "svd_llm with shares by truncation loss within each module type",
        "2503.12340",
        weighting=OutputError(),
        allocate=ByType(),
    )
