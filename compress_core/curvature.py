"""How much the model's predictions move where a layer's outputs err: the output side of K-FAC.

For small errors δ_t of a layer's outputs the KL divergence from the dense model is ½ Σ δ_tᵀ F_t δ_t
with F_t the Fisher information of output t. K-FAC (arXiv 1503.05671) takes F_t and the input x_t to
be independent: with G = E[F_t], H = E[x xᵀ] and E = W − W′ it is ½ tr(G E H Eᵀ) nats per token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compress_core.record import Packed, Record, pack_symmetric, unpack_symmetric

STRIP = 128  # rows of a symmetric matrix that are multiplied at once, up to their diagonal


@dataclass(frozen=True)
class OutputFisher:
    """The Fisher information of one layer's outputs, G = Σ g gᵀ / tokens.

    g is the gradient of a window's summed negative log-likelihood with respect to the output at one
    token, its labels sampled from the model. It belongs to the dense model and some text, not to
    any method or budget.

    Attributes:
        tokens: Number of tokens behind it.
        gram: Σ g gᵀ, (out, out), symmetric, in nats squared per squared unit of output.
    """

    tokens: int
    gram: Tensor

    def damped(self, damp: float) -> Tensor:
        """G + damp · (its mean diagonal) · I, float64 (out, out).

        Sums over few tokens know only so many directions; the others would seem to cost nothing.
        """
        moment = self.gram.to(torch.float64) / self.tokens
        ridge = damp * moment.diagonal().mean()
        return moment + ridge * torch.eye(len(moment), dtype=torch.float64, device=moment.device)

    def pack(self) -> Packed:
        """What is kept: the lower triangle in float32, whose rounding is far below any damping."""
        tensors = {"gradient_gram": pack_symmetric(self.gram).to(torch.float32)}
        return Packed(tensors, {"tokens": self.tokens, "out": len(self.gram)})

    @classmethod
    def unpack(cls, record: Record) -> "OutputFisher":
        """What :meth:`pack` kept; the Gram in float64."""
        gram = unpack_symmetric(record.tensor("gradient_gram"), int(record.attrs["out"]))
        return cls(int(record.attrs["tokens"]), gram.to(torch.float64))


def divergence_by_rank(
    weight: Tensor, u: Tensor, v: Tensor, moment: Tensor, fisher: Tensor
) -> Tensor:
    """½ tr(G E H Eᵀ) of the errors E = W − u[:, :r] v[:r] at every rank r, exactly.

    For components that are optimal in the metric H itself v H vᵀ is diagonal, its entries are the
    energies λ_i, and the sum is ½ Σ_{i >= r} λ_i u_iᵀ G u_i. Components of any other metric have
    cross terms, which are counted here, and so is what lies beyond the last component.

    Args:
        weight: W (out, in).
        u: (out, ranks), best component first.
        v: (ranks, in).
        moment: H = E[x xᵀ] (in, in).
        fisher: G (out, out).

    Returns:
        float64 (ranks + 1,), in nats per token where G and H are per token.
    """
    w, u, v = (part.to(torch.float64) for part in (weight, u, v))
    rest = w - u @ v
    moved, weighed = rest @ moment, fisher @ u
    beyond = form_by_column(fisher, moved, rest).sum()
    across = (weighed * (moved @ v.T)).sum(dim=0)
    pairs = (u.T @ weighed) * (v @ moment @ v.T)
    each = pairs.diagonal() + 2 * (pairs.triu(1).sum(dim=1) + across)
    left = torch.cat([each.flip(0).cumsum(0).flip(0), each.new_zeros(1)])
    return ((left + beyond) / 2).clamp_min(0.0)  # below zero by rounding only


def form_by_column(fisher: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a_cᵀ G b_c of every column c of two matrices, (columns,), by half of the products.

    G is symmetric: what is above its diagonal is counted with what is below. So each number is that
    of its column where a is b, and else the sum of all is right where a bᵀ is symmetric.

    Args:
        fisher: G (out, out), symmetric.
        a: (out, columns).
        b: The same.
    """
    found = a.new_zeros(a.shape[1])
    for start in range(0, len(a), STRIP):
        own = slice(start, start + STRIP)
        moved = fisher[own, own] @ a[own]
        moved.addmm_(fisher[own, :start], a[:start], alpha=2)
        found += (moved * b[own]).sum(dim=0)
    return found
