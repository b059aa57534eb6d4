"""SAES-SVD (arXiv 2602.03051): each truncation also makes up for the error of the layers before it.

min ‖u v X − W X‖² + α ‖u v X − W X_dense‖², with X behind the compressed layers and α in closed
form (ACES), clamped to [0.25, 0.75]. From the paper: objective, solution, β, clamp, uniform ranks.
Ours: no root of H is formed (see ``refine.cross_truncation``), directions that float32 activations
do not know are left out of H⁺, and inputs are measured after every layer, not only after every
block.
"""

from compress_core.fit import Prefix
from compress_core.method import Method
from compress_core.metric import OutputError
from compress_core.refine.cross_truncation import CrossTruncate


def saes_svd(alpha_least: float = 0.25, alpha_most: float = 0.75, prefix: str = "layer") -> Method:
    """Truncation with cross statistics.

    Args:
        alpha_least: Smallest weight of the dense outputs against the layer's own.
        alpha_most: Largest.
        prefix: Whether inputs are measured again after each "layer" or each "block".

    Raises:
        ConfigError: The weights are negative or in the wrong order.
    """
    return Method(
        "saes_svd",
        "truncation that makes up for earlier layers' errors",
        "2602.03051",
        weighting=OutputError(),
        fit=CrossTruncate(alpha_least, alpha_most),
        prefix=Prefix(prefix),  # type: ignore[arg-type]  # it checks
    )
