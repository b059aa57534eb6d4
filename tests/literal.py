"""Our own transcriptions of the papers' formulas, as printed: slow, for full-rank input only."""

import torch
from torch import Tensor


def truncate(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of that rank in the Frobenius norm."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def svd_llm(weight: Tensor, inputs: Tensor, rank: int) -> Tensor:
    """arXiv 2403.07378, Algorithm 1: S = chol(X Xᵀ), W' = SVD_k(W S) S⁻¹."""
    s = torch.linalg.cholesky(inputs.T @ inputs)
    return truncate(weight @ s, rank) @ torch.linalg.inv(s)


def asvd(weight: Tensor, inputs: Tensor, rank: int, alpha: float = 0.5) -> Tensor:
    """arXiv 2312.05821, section 3.2: W' = SVD_k(W diag(d)) diag(d)⁻¹."""
    d = inputs.abs().mean(dim=0) ** alpha + 1e-6
    return truncate(weight * d, rank) / d
