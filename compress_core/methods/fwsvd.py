"""FWSVD (arXiv 2207.00112): truncated SVD of W · diag(d), d from the weights' Fisher information.

d_j is the root of the empirical Fisher information of the weights that input j meets: the squared
gradient of the language-model loss, averaged over calibration windows and summed over outputs (the
paper writes x W, so its rows are our columns). It needs one backward pass, which is cached.

Deviation: the mean over outputs and the sum differ by a factor that changes nothing; ``epsilon``
keeps inputs without gradient in. Un-scaling never divides (see ``decompose``).
"""

from compress_core.method import Method
from compress_core.metric import FisherScale


def fwsvd(epsilon: float = 1e-6) -> Method:
    """Inputs whose weights matter to the loss are approximated better; uniform ranks.

    Args:
        epsilon: Added to every scale, relative to their mean.

    Raises:
        ConfigError: epsilon <= 0.
    """
    return Method(
        "fwsvd",
        "SVD scaled by the Fisher information of the weights",
        "2207.00112",
        weighting=FisherScale(epsilon=epsilon),
    )
