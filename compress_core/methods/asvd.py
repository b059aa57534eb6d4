"""ASVD (arXiv 2312.05821): truncated SVD of W · diag(d), d_j = (mean |x_j|)^alpha, un-scaled after.

Deviation: ranks are uniform, as in the comparisons of the later papers, not searched layer by layer
by perplexity (the paper's STRS), which costs hours and is an allocation that any method could use.
Un-scaling never divides: the optimum is written as a projection of outputs (see ``decompose``).
"""

from compress_core.method import Method
from compress_core.metric import ActivationScale


def asvd(alpha: float = 0.5, epsilon: float = 1e-6) -> Method:
    """Channels that carry large activations are approximated better.

    Args:
        alpha: Exponent of the mean magnitude; 0 is plain SVD.
        epsilon: Added to every scale.

    Raises:
        ConfigError: alpha < 0 or epsilon <= 0.
    """
    weighting = ActivationScale(alpha=alpha, epsilon=epsilon)
    return Method("asvd", "SVD scaled by mean input magnitude", "2312.05821", weighting=weighting)
