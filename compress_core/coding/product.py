"""Both matrices of a product in codes, as plain factors or in the pivot form.

The in-factor is rounded, the out-factor fitted to that and rounded, and the in-factor fitted and
rounded once more: what is rounded last cannot be made up for, and among the inputs of a layer GPTQ
makes up for more than among the few between two factors. Of the two in-factors the better stays.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress_core.coding.error import output_error
from compress_core.coding.evened import evened
from compress_core.coding.gptq import Swept
from compress_core.coding.rounded import Rounded, rounded
from compress_core.coding.settings import Coding
from compress_core.errors import ConfigError
from compress_core.forms.codes import Coded
from compress_core.forms.factors import Factors
from compress_core.forms.part import Kind
from compress_core.forms.pivot import Pivot
from compress_core.metric import SecondMoment
from compress_core.refine.least_squares import update_in, update_out
from compress_core.sparse import unpack_bits


@dataclass(frozen=True)
class Shape:
    """A product as a form holds it.

    Attributes:
        inner: The in-factor (rank, in).
        outer: What is stored of the out-factor, (rows, rank), in the slot ``weight``.
        rows: Which of its rows that is.
        frame: The out-factor (out, rank) with zeros for these; the others are always the same.
        slot: The in-factor's.
        along: Where the groups of ``outer`` run.
        ordered: Whether its columns may be rounded in another order.
        places: What else is stored.
    """

    inner: Tensor
    outer: Tensor
    rows: Tensor
    frame: Tensor
    slot: str
    along: int
    ordered: bool
    places: dict[str, Tensor]

    def whole(self, outer: Tensor) -> Tensor:
        """The out-factor (out, rank)."""
        return self.frame.index_copy(0, self.rows, outer)


def shape_of(
    kind: type[Kind], u: Tensor, v: Tensor, moment: Tensor | None, damping: float
) -> Shape:
    """A product of U (out, rank) and V (rank, in) in a form; all float64.

    Args:
        kind: The form's.
        u: U.
        v: V.
        moment: H (in, in), by which plain factors are evened out; None leaves them as they are.
        damping: As of :func:`evened`.

    Raises:
        ConfigError: A form whose numbers cannot be in codes of few bits.
    """
    frame = torch.zeros_like(u)
    if kind is Factors:
        u, v = (u, v) if moment is None else evened(u, v, moment, damping)
        rows = torch.arange(len(u), device=u.device)
        # The turn belongs to the order in which it leaves the columns.
        return Shape(v, u, rows, frame, "factor_in", 0, False, {})
    if kind is not Pivot:
        raise ConfigError(f"{kind.words} are stored in one way only: leave out the bits of codes")
    tensors = Pivot.pack(u, v, torch.float64)
    own = unpack_bits(tensors["pivot_rows"], len(u))
    frame[own] = torch.eye(u.shape[1], dtype=u.dtype, device=u.device)
    rows = (~own).nonzero().flatten()
    places = {"pivot_rows": tensors["pivot_rows"]}
    inner, outer = tensors["pivot_in"], tensors["weight"]
    return Shape(inner, outer, rows, frame, "pivot_in", 1, True, places)


@dataclass(frozen=True)
class CodedProduct:
    """A product as it will be stored.

    Attributes:
        stored: Slot to codes or numbers.
        u: Of what it stands for, float64 (out, rank).
        v: (rank, in).
    """

    stored: dict[str, Coded | Tensor]
    u: Tensor
    v: Tensor


def nearest_product(shape: Shape, coding: Coding, dtype: torch.dtype) -> CodedProduct:
    """Both matrices in their nearest codes, neither fitted to the other."""
    inner = rounded(shape.slot, shape.inner, coding, dtype)
    outer = rounded("weight", shape.outer, coding, dtype, along=shape.along)
    return _coded(shape, inner, outer)


def fitted_product(
    shape: Shape, target: Tensor, moment: Tensor, swept: Swept, coding: Coding, dtype: torch.dtype
) -> CodedProduct:
    """Both matrices by GPTQ, each fitted to what the other was rounded to.

    Args:
        shape: The product before.
        target: The weight (out, in) whose outputs it is fitted to.
        moment: H (in, in).
        swept: Of H, by the same coding.
        coding: How.
        dtype: Of scales, and of numbers that are in no codes.

    Raises:
        NumericsError: A number is not finite, or beyond ``dtype``.
    """
    first = rounded(shape.slot, shape.inner, coding, dtype, swept)
    outer = update_out(target[shape.rows], first.value, moment, moment)
    inward = replace(coding, order=coding.order and shape.ordered)
    among = Swept.of(SecondMoment(moment).output_gram(first.value), inward)
    found = rounded("weight", outer, inward, dtype, among, along=shape.along)
    u = shape.whole(found.value)
    again = update_in(target, u, moment, moment)
    second = rounded(shape.slot, again, coding, dtype, swept)
    errors = [output_error(target - u @ inner.value, moment) for inner in (first, second)]
    return _coded(shape, first if errors[0] <= errors[1] else second, found)


def _coded(shape: Shape, inner: Rounded, outer: Rounded) -> CodedProduct:
    stored = {shape.slot: inner.stored, "weight": outer.stored, **shape.places}
    return CodedProduct(stored, shape.whole(outer.value), inner.value)
