"""Our own transcriptions of the papers' formulas, as printed: slow, for full-rank input only."""

import math
from collections.abc import Sequence

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


def root(moment: Tensor) -> Tensor:
    """The symmetric root of a positive definite matrix."""
    values, vectors = torch.linalg.eigh(moment)
    return vectors @ values.sqrt().diag() @ vectors.T


def two_sided(weight: Tensor, h: Tensor, g: Tensor, rank: int) -> Tensor:
    """KFAC-SVD, OBD-LLM (arXiv 2604.00821): A = G^½, S = H^½, W' = A⁻¹ SVD_k(A W S) S⁻¹."""
    a, s = root(g), root(h)
    return torch.linalg.inv(a) @ truncate(a @ weight @ s, rank) @ torch.linalg.inv(s)


def add_up_to_nearest(
    tables: Sequence[Sequence[tuple[int, float]]], target: int, total: int
) -> list[int]:
    """arXiv 2510.19385, published code: a knapsack whose costs are floored to units of the total.

    Of the states it takes the one closest to the target, then the least loss.

    Args:
        tables: Per module, (parameters, loss) of its candidates.
        target: Parameters that should stay.
        total: Parameters of the dense modules.

    Returns:
        Index of the candidate per module.
    """
    unit = total // 10000 + 1
    states: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for table in tables:
        after: dict[int, tuple[float, list[int]]] = {}
        for units, (loss, chosen) in states.items():
            for index, (cost, more) in enumerate(table):
                state = units + cost // unit
                if state not in after or loss + more < after[state][0]:
                    after[state] = (loss + more, [*chosen, index])
        states = after
    nearest = min(states, key=lambda units: (abs(units - target // unit), states[units][0]))
    return states[nearest][1]


def ada_cr(importance: Sequence[float], mrr: float, trr: float) -> list[float]:
    """arXiv 2502.01403, adaCR: I_n = I / mean(I), CR = mrr + I_n (trr − mrr)."""
    mean = sum(importance) / len(importance)
    return [mrr + value / mean * (trr - mrr) for value in importance]


def by_type(losses: Sequence[float], kept: float) -> list[float]:
    """arXiv 2503.12340: removal of a layer = N R score / Σ score, score = 1 / log L.

    Args:
        losses: L of the layers of one type; log L is guarded as log(e + L).
        kept: 1 − R.

    Returns:
        Share that each layer keeps.
    """
    scores = [1 / math.log(math.e + loss) for loss in losses]
    return [1 - len(losses) * (1 - kept) * score / sum(scores) for score in scores]


def ada_svd(
    weight: Tensor, u: Tensor, v: Tensor, inputs: Tensor, outputs: Tensor
) -> tuple[Tensor, Tensor]:
    """arXiv 2502.01403, adaComp, on explicit inputs (tokens, in): one sweep of both updates.

    A = Xᵀ Vᵀ, B = the outputs wanted (tokens, out), U ← (A⁺ B)ᵀ; then V ← U⁺ W, which the paper
    prints with a slip in the transposes.
    """
    u = (torch.linalg.pinv(inputs @ v.T) @ outputs).T
    return u, torch.linalg.pinv(u) @ weight


def saes_svd(weight: Tensor, gram: Tensor, cross: Tensor, rank: int, alpha: float) -> Tensor:
    """arXiv 2602.03051: G = W (H + β Δ) H^{-½}, β = α / (1 + α), W′ = SVD_k(G) H^{-½}."""
    root = _inverse_root(gram)
    beta = alpha / (1 + alpha)
    return truncate(weight @ (gram + beta * (cross - gram)) @ root, rank) @ root


def aces(
    weight: Tensor, gram: Tensor, cross: Tensor, rank: int, alphas: tuple[float, float]
) -> float:
    """arXiv 2602.03051, ACES: the α of the least part of the energy outside the subspace at β = 0.

    That part is (a + 2bβ + cβ²) / (A + 2Bβ + Cβ²), here at 20001 values of β that α allows.
    """
    root = _inverse_root(gram)
    s, d = weight @ torch.linalg.inv(root), weight @ (cross - gram) @ root
    q = torch.linalg.svd(s)[0][:, :rank]
    s_out, d_out = s - q @ (q.T @ s), d - q @ (q.T @ d)
    low, high = (alpha / (1 + alpha) for alpha in alphas)
    beta = torch.linspace(low, high, 20001, dtype=torch.float64)
    outside = (s_out**2).sum() + 2 * beta * (s_out * d_out).sum() + beta**2 * (d_out**2).sum()
    whole = (s**2).sum() + 2 * beta * (s * d).sum() + beta**2 * (d**2).sum()
    best = float(beta[(outside / whole).argmin()])
    return best / (1 - best)


def duo_svd_order(weight: Tensor, inputs: Tensor, rank: int) -> Tensor:
    """arXiv 2510.19385: columns by ‖E_:j‖² H_jj, with E what the truncation at ``rank`` leaves."""
    error = weight - svd_llm(weight, inputs, rank)
    worth = (error**2).sum(dim=0) * (inputs**2).sum(dim=0)
    return worth.argsort(descending=True)


def duo_svd_error(weight: Tensor, inputs: Tensor, rest: Tensor, rank: int) -> float:
    """arXiv 2510.19385: root of Σ_{i > rank} σ_i(W_rest chol(H_rest))²."""
    s = torch.linalg.cholesky((inputs.T @ inputs)[rest][:, rest])
    return float((torch.linalg.svdvals(weight[:, rest] @ s)[rank:] ** 2).sum().sqrt())


def stack_of_batch(inputs: Tensor, order: Sequence[int], buckets: int) -> Tensor:
    """arXiv 2502.01403, section 3.3: X'_j = mean of the j-th mini_bsz of the shuffled samples.

    Args:
        inputs: (samples, length, in).
        order: The shuffled samples.
        buckets: M; mini_bsz = ceil(samples / M).

    Returns:
        (buckets, length, in).
    """
    size = math.ceil(len(order) / buckets)
    parts = [order[start : start + size] for start in range(0, len(order), size)]
    return torch.stack([inputs[list(part)].mean(dim=0) for part in parts])


def _inverse_root(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    return (vectors / values.sqrt()) @ vectors.T
