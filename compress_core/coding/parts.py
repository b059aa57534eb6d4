"""All that a layer stores in codes, each part fitted to what was rounded before it.

Entries go first, then columns, a base, and the product, which is cut anew to what the others leave.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compress_core.coding.entries import gptq_entries
from compress_core.coding.gptq import Swept
from compress_core.coding.grid import decoded
from compress_core.coding.product import fitted_product, nearest_product, shape_of
from compress_core.coding.rounded import Rounded, rounded
from compress_core.coding.settings import Coding
from compress_core.decompose import LowRank, project, split_inputs
from compress_core.errors import ConfigError
from compress_core.forms.codes import Coded
from compress_core.forms.columns import Columns
from compress_core.forms.entries import Entries
from compress_core.forms.factors import Factors
from compress_core.forms.names import FULL
from compress_core.forms.products import product_form
from compress_core.metric import SecondMoment
from compress_core.refine.inverse import inverse
from compress_core.refine.least_squares import INPUT_FLOOR
from compress_core.sparse import Sparse


@dataclass(frozen=True)
class CodedParts:
    """What a layer stores.

    Attributes:
        codes: Slot to the codes in it. Of plain factors' ``weight`` and of ``columns`` they are
            those of the transpose, with groups along outputs; of entries one row.
        tensors: Slot to what is in no codes: numbers in the dtype of the model, and places.
        entry: What an entry says of it but the codes.
        low: What all that stands for, float64, and the bias as it was.
        coding: How it was rounded.
    """

    codes: dict[str, Coded]
    tensors: dict[str, Tensor]
    entry: dict[str, Any]
    low: LowRank
    coding: Coding


def code_layer(
    low: LowRank,
    moment: Tensor | None,
    coding: Coding,
    form: str,
    dtype: torch.dtype,
    toward: Tensor | None = None,
    swept: Swept | None = None,
) -> CodedParts:
    """Rounds what a fit ended with.

    Args:
        low: The fit, float64.
        moment: H = E[x xᵀ] (in, in) of the inputs, float64; None with the rounding "nearest",
            which fits nothing again.
        coding: How, with the bits.
        form: Of the product, a key of ``FORMS``: plain factors or the pivot form.
        dtype: Of scales, and of numbers that are in no codes.
        toward: The weight (out, in) whose outputs the parts are fitted to; None for what they are
            together before anything is rounded.
        swept: Of ``moment``, by the same coding, where it is there already.

    Raises:
        ConfigError: Bits that nothing says, a moment that is missing, or a form without codes.
        NumericsError: A part or the moment is not finite, or beyond ``dtype``.
    """
    if coding.reads_inputs and moment is None:
        raise ConfigError(
            "rounding by gptq reads the second moment of a layer's inputs, and there is none: "
            "give calibration text, or rounding=nearest"
        )
    target = low.dense() if toward is None else toward
    rounder = _Rounder(low, target, moment, coding, dtype)
    rounder.all_inputs = swept
    rounder.entries()
    rounder.columns()
    rounder.base()
    rounder.product(form)
    return CodedParts(
        {slot: found for slot, found in rounder.stored.items() if isinstance(found, Coded)},
        {slot: found for slot, found in rounder.stored.items() if isinstance(found, Tensor)},
        rounder.entry,
        rounder.low,
        coding,
    )


class _Rounder:
    """Goes through the parts; ``low`` is made of those that are rounded and of the others."""

    def __init__(
        self,
        low: LowRank,
        target: Tensor,
        moment: Tensor | None,
        coding: Coding,
        dtype: torch.dtype,
    ) -> None:
        self.low, self.target, self.coding, self.dtype = low, target, coding, dtype
        self.moment = moment if coding.reads_inputs else None
        self.all_inputs: Swept | None = None
        self.stored: dict[str, Coded | Tensor] = {}
        self.entry: dict[str, Any] = {}

    def entries(self) -> None:
        """In that of all inputs, with their places as they are."""
        sparse, coding = self.low.sparse, self.coding
        if sparse is None or not sparse.nonzeros:
            return
        bits = coding.bits_of("sparse_values")
        if self.moment is None or bits == FULL:
            found = rounded("sparse_values", sparse.values[None], coding, self.dtype)
        else:
            swept = self._swept(self.moment)
            codes = gptq_entries(sparse, swept, coding.at(bits), self.dtype)
            found = Rounded(codes, decoded(codes, coding.group))
        self.low = replace(self.low, sparse=Sparse(sparse.mask, found.value[0]))
        self.entry["nonzeros"] = sparse.nonzeros
        self.stored |= Entries.pack(sparse.mask, sparse.values)
        row = found.stored
        self.stored["sparse_values"] = row if isinstance(row, Coded) else row[0]

    def columns(self) -> None:
        """In the second moment of their own inputs."""
        columns, index = self.low.columns, self.low.index
        if columns is None or index is None:
            return
        swept = None
        if self.moment is not None:
            columns = self._left(columns=torch.zeros_like(columns))[:, index]
            swept = Swept.of(self.moment[index][:, index], self.coding)
        found = rounded("columns", columns, self.coding, self.dtype, swept, along=0)
        self.low = replace(self.low, columns=found.value)
        self.entry["columns"] = len(index)
        self.stored |= Columns.pack(columns, index)
        self.stored["columns"] = found.stored

    def base(self) -> None:
        """In that of all inputs."""
        base, swept = self.low.base, None
        if base is None:
            return
        if self.moment is not None:
            base, swept = self._left(base=None), self._swept(self.moment)
        found = rounded("base", base, self.coding, self.dtype, swept)
        self.low = replace(self.low, base=found.value)
        self.entry["base"] = True
        self.stored["base"] = found.stored

    def product(self, form: str) -> None:
        """The product, in a form."""
        low, coding, dtype = self.low, self.coding, self.dtype
        taken = self.entry.get("columns", 0)
        kind, says = product_form(form, low.rank, len(low.u), low.in_features, taken)
        beside = bool(self.stored)
        self.entry = says | self.entry
        if low.rank == 0:
            self.stored |= Factors.pack(low.u.to(dtype), low.v.to(dtype), dtype)
            return
        if self.moment is None:
            found = nearest_product(shape_of(kind, low.u, low.v, None, 0.0), coding, dtype)
        else:
            target, moment = self._of_rest(self._left(u=torch.zeros_like(low.u)), self.moment)
            u, v = low.u, low.v
            if beside:
                u, v, _ = project(target, SecondMoment(moment), low.rank)
            shape = shape_of(kind, u, v, moment, coding.damping)
            swept = self._swept(moment)
            found = fitted_product(shape, target, moment, swept, coding, dtype)
        self.low = replace(low, u=found.u, v=found.v)
        self.stored |= found.stored

    def _swept(self, moment: Tensor) -> Swept:
        """What sweeps read of a moment; that of all inputs is made once."""
        if moment is not self.moment:
            return Swept.of(moment, self.coding)
        if self.all_inputs is None:
            self.all_inputs = Swept.of(moment, self.coding)
        return self.all_inputs

    def _left(self, **without: Tensor | None) -> Tensor:
        """What all parts but one leave of the target, (out, in)."""
        return self.target - replace(self.low, **without).dense()  # type: ignore[arg-type]

    def _of_rest(self, left: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
        """What the inputs without columns can give of it, and their second moment."""
        if self.low.index is None:
            return left, moment
        rest, kept = split_inputs(len(moment), self.low.index)
        own = moment[rest][:, rest]
        explained = moment[kept][:, rest] @ inverse(own, INPUT_FLOOR)
        return left[:, rest] + left[:, kept] @ explained, own
