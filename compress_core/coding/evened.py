"""A product turned so that the codes of its out-factor cost least.

With u orthonormal the inner inputs v x of a product u v have energies λ, and do not correlate:
whatever column of u is rounded, no other can make up for it, and codes of all columns, about
equally far off, cost Σ λ_i. For any orthogonal Q (u Q)(Qᵀ v) is the same product. Of all of them
those cost least whose inner inputs explain one another so that d_j, what those behind j leave of
input j, is the same for all: d = (Π λ)^{1/r}, the geometric mean in place of the arithmetic. They
follow from the geometric mean decomposition (Jiang, Hager and Li 2005, "The geometric mean
decomposition", Linear Algebra and its Applications 396): Λ^½ = Q R Pᵀ with R upper triangular and
its diagonal constant, so that Qᵀ Λ Q = R Rᵀ. Rows of v keep their sum of squares, and its codes
cost about the same.
"""

import math

import torch
from torch import Tensor

from compress_core.decompose import eigen_descending
from compress_core.metric import SecondMoment

LEAST = 1e-12  # of the largest energy: what is below it is rounding


def evened(u: Tensor, v: Tensor, moment: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The same product, with u orthonormal and inner inputs as above.

    Args:
        u: (out, r), float64.
        v: (r, in).
        moment: H = E[x xᵀ] (in, in).
        damping: Part of the mean energy that is added to each, as GPTQ will.
    """
    basis, triangle = torch.linalg.qr(u)
    v = triangle @ v
    vectors, energy = eigen_descending(SecondMoment(moment).output_gram(v))
    energy = energy + damping * energy.mean()
    if not len(energy) or not float(energy[0]) > 0:
        return basis, v
    turn = vectors @ even_turn(energy.clamp_min(LEAST * float(energy[0])))
    return basis @ turn, turn.T @ v


def even_turn(energy: Tensor) -> Tensor:
    """Q (r, r) with Qᵀ diag(λ) Q = R Rᵀ, R upper triangular with constant diagonal.

    Each step pairs what is at the front with one on the other side of the mean, and turns both so
    that the front has the mean; what is left keeps the product.

    Args:
        energy: λ (r,), above zero.
    """
    sizes = energy.sqrt().tolist()
    mean = math.exp(math.fsum(map(math.log, sizes)) / len(sizes))
    turn = torch.eye(len(sizes), dtype=energy.dtype)  # many small steps: no work for a GPU
    for k in range(len(sizes) - 1):
        farthest = min if sizes[k] >= mean else max
        partner = sizes.index(farthest(sizes[k + 1 :]), k + 1)
        sizes[k + 1], sizes[partner] = sizes[partner], sizes[k + 1]
        turn[:, [k + 1, partner]] = turn[:, [partner, k + 1]]
        front, other = sizes[k], sizes[k + 1]
        if front == other:
            continue
        part = (mean**2 - other**2) / (front**2 - other**2)
        cosine = math.sqrt(min(max(part, 0.0), 1.0))  # outside by rounding only
        sine = math.sqrt(1 - cosine**2)
        pair = [[cosine * front, -sine * other], [sine * other, cosine * front]]
        turn[:, k : k + 2] = turn[:, k : k + 2] @ (turn.new_tensor(pair) / mean)
        sizes[k], sizes[k + 1] = mean, front * other / mean
    return turn.to(energy.device)
