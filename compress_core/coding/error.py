"""What rounding costs at a layer's outputs, measured: by doing it."""

from collections.abc import Iterable

import torch
from torch import Tensor

from compress_core.coding.gptq import Swept, gptq
from compress_core.coding.grid import decoded
from compress_core.coding.settings import Coding
from compress_core.forms.names import WIDTHS


def output_error(difference: Tensor, moment: Tensor, fisher: Tensor | None = None) -> float:
    """tr(E H Eᵀ), the squared error of the outputs per token; with G ½ tr(G E H Eᵀ), in nats.

    Args:
        difference: E (out, in), float64.
        moment: H = E[x xᵀ] (in, in).
        fisher: G (out, out), if error is to be weighed by it (see ``curvature``).
    """
    errors = difference @ moment
    if fisher is None:
        return float((errors * difference).sum())
    return float((fisher @ errors * difference).sum()) / 2


def error_by_width(
    weight: Tensor,
    moment: Tensor,
    coding: Coding,
    dtype: torch.dtype,
    fisher: Tensor | None = None,
    widths: Iterable[int] = WIDTHS,
) -> dict[int, float]:
    """Bits to the output error of a weight that GPTQ rounds to codes of so many.

    Args:
        weight: W (out, in), float64.
        moment: H (in, in).
        coding: Group, damping, search and order.
        dtype: Of the scales.
        fisher: As of :func:`output_error`.
        widths: The bits.

    Raises:
        NumericsError: H is no second moment, or the weight not finite.
    """
    swept = Swept.of(moment, coding)
    found = {}
    for bits in widths:
        codes = gptq(weight, swept, coding.at(bits), dtype)
        found[bits] = output_error(weight - decoded(codes, coding.group), moment, fisher)
    return found
