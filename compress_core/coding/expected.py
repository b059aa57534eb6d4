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

import torch
from torch import Tensor

from compress_core.coding.evened import evened
from compress_core.forms.codes import groups_of
from compress_core.forms.names import FULL
from compress_core.forms.pivot import Pivot
from compress_core.forms.products import FORMS, product_form
from compress_core.prune.obs import damped, inverse_factor
from compress_core.sparse import unpack_bits

DAMPING = 0.01  # of H, as in GPTQ
PARTS = (0.125, 0.25, 0.5, 0.75, 1.0)  # of the ranks, at which a product is looked at


def steps_squared(bits: int) -> float:
    """(2^b - 1)², by which κ is divided; infinite for numbers that are in no code."""
    return float("inf") if bits >= FULL else float((2**bits - 1) ** 2)


def costs_of_codes(
    weight: Tensor, u: Tensor, v: Tensor, moment: Tensor, fisher: Tensor, form: str, group: int
) -> Tensor:
    """κ of a weight first and then of its product at every rank, float64 (ranks + 2,).

    Arguments as of :func:`whole_cost_of_codes` and :func:`curve_of_codes`.
    """
    left = _left(moment)
    whole = u.new_tensor([_whole(weight, left, fisher, group)])
    return torch.cat([whole.cpu(), _curve(u, v, moment, left, fisher, form, group)])


def whole_cost_of_codes(weight: Tensor, moment: Tensor, fisher: Tensor, group: int) -> float:
    """κ of a layer's own weight, in nats per token.

    Args:
        weight: W (out, in), float64.
        moment: H = E[x xᵀ] (in, in).
        fisher: G (out, out).
        group: Codes that share a scale.
    """
    return _whole(weight, _left(moment), fisher, group)


def product_cost_of_codes(
    u: Tensor, v: Tensor, moment: Tensor, fisher: Tensor, form: str, group: int
) -> float:
    """κ of both matrices of a product u v, (out, r) and (r, in), stored in a form; in nats."""
    return _product(u, v, moment, _left(moment), fisher, form, group)


def curve_of_codes(
    u: Tensor, v: Tensor, moment: Tensor, fisher: Tensor, form: str, group: int
) -> Tensor:
    """κ at every rank of a decomposition, float64 (ranks + 1,): of some ranks, and lines between.

    Args:
        u: (out, ranks), best component first, float64.
        v: (ranks, in).
        moment: H (in, in).
        fisher: G (out, out).
        form: In which products are stored, a key of ``FORMS``.
        group: Codes that share a scale.
    """
    return _curve(u, v, moment, _left(moment), fisher, form, group)


def _whole(weight: Tensor, left: Tensor, fisher: Tensor, group: int) -> float:
    return float((fisher.diagonal() * _rows(weight, left, group)).sum()) / 2


def _curve(
    u: Tensor, v: Tensor, moment: Tensor, left: Tensor, fisher: Tensor, form: str, group: int
) -> Tensor:
    assert form in FORMS
    ranks = u.shape[1]
    at = sorted({max(1, round(part * ranks)) for part in PARTS}) if ranks else []
    known = [_product(u[:, :r], v[:r], moment, left, fisher, form, group) for r in at]
    return _lines([0, *at], [0.0, *known], ranks)


def _product(
    u: Tensor, v: Tensor, moment: Tensor, left: Tensor, fisher: Tensor, form: str, group: int
) -> float:
    kind, _ = product_form(form, u.shape[1], u.shape[0], v.shape[1])
    if kind is Pivot:
        return _pivot(u, v, moment, left, fisher, group)
    basis, v = evened(u, v, moment, DAMPING)
    inner = (basis * (fisher @ basis)).sum(dim=0)
    of_v = (inner * _rows(v, left, group)).sum()
    # Groups of the out-factor run along its outputs.
    spans = ranges(basis.T.contiguous(), group).square().T  # (out, r)
    of_u = (fisher.diagonal()[:, None] * spans * _left(v @ moment @ v.T)).sum() / 12
    return float(of_v + of_u) / 2


def _lines(at: Sequence[int], known: Sequence[float], last: int) -> Tensor:
    found = torch.zeros(last + 1, dtype=torch.float64)
    for left, right, low, high in zip(at, at[1:], known, known[1:], strict=False):
        found[left : right + 1] = torch.linspace(low, high, right - left + 1, dtype=torch.float64)
    return found


def _pivot(u: Tensor, v: Tensor, moment: Tensor, left: Tensor, fisher: Tensor, group: int) -> float:
    tensors = Pivot.pack(u, v, torch.float64)
    b, c = tensors["pivot_in"], tensors["weight"]
    named = unpack_bits(tensors["pivot_rows"], len(u))
    rows, others = named.nonzero().flatten(), (~named).nonzero().flatten()
    spread = torch.zeros(len(u), len(b), dtype=torch.float64, device=u.device)
    spread[rows] = torch.eye(len(b)).to(spread)
    spread[others] = c
    inner = (spread * (fisher @ spread)).sum(dim=0)  # an error of B is in all rows
    of_b = (inner * _rows(b, left, group)).sum()
    of_c = (fisher.diagonal()[others] * _rows(c, _left(b @ moment @ b.T), group)).sum()
    return float(of_b + of_c) / 2


def _left(moment: Tensor) -> Tensor:
    return unsaid(moment, inverse_factor(damped(moment, DAMPING), DAMPING))


def unsaid(moment: Tensor, factor: Tensor) -> Tensor:
    """d (in,): of each input what those behind it leave unsaid; 0 where it is always zero.

    Args:
        moment: H (in, in).
        factor: As :func:`inverse_factor` makes it of H, damped.
    """
    return torch.where(moment.diagonal() > 0, factor.diagonal().square().reciprocal(), 0.0)


def _rows(matrix: Tensor, left: Tensor, group: int) -> Tensor:
    """Σ_j range² d_j / 12 of every row, (rows,)."""
    return (ranges(matrix, group).square() * left).sum(dim=1) / 12


def ranges(matrix: Tensor, group: int) -> Tensor:
    """Of every number the range of its group, zero counted in: as large as the matrix."""
    length = matrix.shape[1]
    short = groups_of(length, group) * group - length
    table = torch.nn.functional.pad(matrix, (0, short)).unflatten(1, (-1, group))
    spans = table.amax(dim=2).clamp_min(0) - table.amin(dim=2).clamp_max(0)
    return spans.repeat_interleave(group, dim=1)[:, :length]
