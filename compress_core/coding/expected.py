"""What rounding to codes is expected to cost, before anything is rounded.

A code is off by up to half a step s, evenly: s²/12 on average. GPTQ (arXiv 2210.17323) goes
through the columns and lets those to come make up for each error, so that one in column j costs
d_j = 1 / [H_F⁻¹]_jj times its square, F the columns from j on: what the later inputs cannot say of
input j. With s the range of a group over 2^b - 1 a matrix costs κ / (2^b - 1)² at every width b,
κ = Σ_i w_i Σ_j range_ij² d_j / 12; w_i says what an error of row i weighs. Rows err independently,
so that with G the Fisher information of the outputs w_i = G_ii / 2 makes it nats of KL (see
``curvature``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from compress_core.coding.evened import evened
from compress_core.curvature import form_by_column
from compress_core.forms.codes import groups_of
from compress_core.forms.names import FULL
from compress_core.forms.pivot import Pivot, pivot_rows
from compress_core.forms.products import FORMS, product_form
from compress_core.prune.obs import damped, upper_factor

DAMPING = 0.01  # of H, as in GPTQ
PARTS = (0.125, 0.25, 0.5, 0.75, 1.0)  # of the ranks, at which a product is looked at


def steps_squared(bits: int) -> float:
    """(2^b - 1)², by which κ is divided; infinite for numbers that are in no code."""
    return float("inf") if bits >= FULL else float((2**bits - 1) ** 2)


@dataclass(frozen=True)
class Inputs:
    """A second moment, and what these costs read of it, made when it is asked for.

    Attributes:
        moment: H = E[x xᵀ], float64 (in, in).
    """

    moment: Tensor

    @cached_property
    def triangle(self) -> Tensor:
        """R (in, in), upper triangular, with H + diag(added) = R Rᵀ.

        Raises:
            NumericsError: H is no second moment.
        """
        return upper_factor(damped(self.moment, DAMPING), DAMPING)

    @cached_property
    def added(self) -> Tensor:
        """What damping adds to the diagonal, (in,)."""
        return damped(self.moment, DAMPING).diagonal() - self.moment.diagonal()

    @cached_property
    def unsaid(self) -> Tensor:
        """d (in,): of each input what those behind it leave unsaid; 0 where it is always zero."""
        alive = self.moment.diagonal() > 0
        return torch.where(alive, self.triangle.diagonal().square(), 0.0)


def costs_of_codes(
    weight: Tensor, u: Tensor, v: Tensor, inputs: Inputs, fisher: Tensor, form: str, group: int
) -> Tensor:
    """κ of a weight first and then of its product at every rank, float64 (ranks + 2,).

    Arguments as of :func:`whole_cost_of_codes` and :func:`curve_of_codes`.
    """
    whole = u.new_tensor([whole_cost_of_codes(weight, inputs, fisher, group)])
    return torch.cat([whole.cpu(), curve_of_codes(u, v, inputs, fisher, form, group)])


def whole_cost_of_codes(weight: Tensor, inputs: Inputs, fisher: Tensor, group: int) -> float:
    """κ of a layer's own weight, in nats per token.

    Args:
        weight: W (out, in), float64.
        inputs: Their second moment.
        fisher: G (out, out).
        group: Codes that share a scale.
    """
    return float((fisher.diagonal() * row_costs(weight, inputs.unsaid, group)).sum()) / 2


def curve_of_codes(
    u: Tensor, v: Tensor, inputs: Inputs, fisher: Tensor, form: str, group: int
) -> Tensor:
    """κ at every rank of a decomposition, float64 (ranks + 1,): of some ranks, and lines between.

    It is that of both matrices of the product, as they are stored, in nats.

    Args:
        u: (out, ranks), best component first, float64.
        v: (ranks, in).
        inputs: Their second moment.
        fisher: G (out, out).
        form: In which products are stored, a key of ``FORMS``.
        group: Codes that share a scale.
    """
    assert form in FORMS
    ranks = u.shape[1]
    at = sorted({max(1, round(part * ranks)) for part in PARTS}) if ranks else []
    products = _Products(u, v, inputs, fisher, group)
    known = [products.cost(form, rank) for rank in at]
    return _lines([0, *at], [0.0, *known], ranks)


class _Products:
    """The products of the first components; what is made once serves all ranks."""

    def __init__(self, u: Tensor, v: Tensor, inputs: Inputs, fisher: Tensor, group: int) -> None:
        self.u, self.v, self.inputs, self.fisher, self.group = u, v, inputs, fisher, group

    @cached_property
    def basis(self) -> Tensor:
        """Orthonormal; its first columns span what those of u do."""
        return torch.linalg.qr(self.u)[0]

    @cached_property
    def inner(self) -> Tensor:
        """v H vᵀ."""
        return self.v @ self.inputs.moment @ self.v.T

    def cost(self, form: str, rank: int) -> float:
        """κ of both matrices at a rank."""
        kind, _ = product_form(form, rank, self.u.shape[0], self.v.shape[1])
        return (self._pivot(rank) if kind is Pivot else self._plain(rank)) / 2

    def _plain(self, rank: int) -> float:
        fisher, moment = self.fisher, self.inputs.moment
        basis, v = evened(self.u[:, :rank], self.v[:rank], moment, DAMPING)
        inner = form_by_column(fisher, basis, basis)
        of_v = (inner * row_costs(v, self.inputs.unsaid, self.group)).sum()
        # Groups of the out-factor run along its outputs.
        unsaid = Inputs(v @ moment @ v.T).unsaid
        of_u = (unsaid * row_costs(basis.T.contiguous(), fisher.diagonal(), self.group)).sum()
        return float(of_v + of_u)

    def _pivot(self, rank: int) -> float:
        rows, others, c = pivot_rows(self.basis[:, :rank])
        own = self.u[rows, :rank]
        b, fisher = own @ self.v[:rank], self.fisher
        spread = torch.zeros_like(self.u[:, :rank])
        spread[rows] = torch.eye(rank).to(spread)
        spread[others] = c
        inner = form_by_column(fisher, spread, spread)  # an error of B is in all rows
        of_b = (inner * row_costs(b, self.inputs.unsaid, self.group)).sum()
        unsaid = Inputs(own @ self.inner[:rank, :rank] @ own.T).unsaid
        of_c = (fisher.diagonal()[others] * row_costs(c, unsaid, self.group)).sum()
        return float(of_b + of_c)


def _lines(at: Sequence[int], known: Sequence[float], last: int) -> Tensor:
    found = torch.zeros(last + 1, dtype=torch.float64)
    for left, right, low, high in zip(at, at[1:], known, known[1:], strict=False):
        found[left : right + 1] = torch.linspace(low, high, right - left + 1, dtype=torch.float64)
    return found


def row_costs(matrix: Tensor, unsaid: Tensor, group: int) -> Tensor:
    """Σ_j range² d_j / 12 of every row, (rows,)."""
    weights = in_groups(unsaid[None], group).sum(dim=2)
    return (spans(matrix, group).square() * weights).sum(dim=1) / 12


def in_groups(matrix: Tensor, group: int) -> Tensor:
    """(rows, groups, group), the last filled up with zeros."""
    length = matrix.shape[1]
    short = groups_of(length, group) * group - length
    return torch.nn.functional.pad(matrix, (0, short)).unflatten(1, (-1, group))


def spans(matrix: Tensor, group: int) -> Tensor:
    """Of every group of a row its range, zero counted in, (rows, groups)."""
    table = in_groups(matrix, group)
    return table.amax(dim=2).clamp_min(0) - table.amin(dim=2).clamp_max(0)
