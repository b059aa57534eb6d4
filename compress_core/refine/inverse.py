"""The inverse of a second moment, as far as it has one."""

import torch
from torch import Tensor


def inverse(gram: Tensor, floor: float) -> Tensor:
    """The pseudo-inverse of a symmetric positive semidefinite matrix.

    Args:
        gram: float64 (n, n).
        floor: Eigenvalues below this part of the largest are noise and count as zero.
    """
    return torch.linalg.pinv(gram, rtol=floor, hermitian=True)
