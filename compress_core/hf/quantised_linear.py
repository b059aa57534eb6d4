"""A factored linear whose factors are stored in 8 bits, as far as both are as long.

Like `factored.py` it needs PyTorch alone and is part of the modelling file in a model folder.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from compress_core.hf.factored import FactoredLinear, _unset
from compress_core.quantise import Codes, widen_codes

BITS = 8


class QuantisedLinear(FactoredLinear):
    """A linear layer U diag(scale) V whose U and V are mostly 8-bit codes.

    Codes stay int8 in memory; each forward widens them, which takes a pass over both factors and
    the memory of one layer's at a time. They are fixed: only scale, rest and bias can be trained,
    gradients pass through to the inputs, and LoRA trains on top.

    The scale is called `weight`, as the out-factor of a FactoredLinear is and for the same reason,
    and because programs ask a layer's `weight` for dtype and device.

    Attributes:
        weight: The scale of every component, (rank,).
        codes_out: U's first rows, int8 (s, rank) with s = min(out, in); 128 stands for 1.
        codes_in: V's first columns, int8 (rank, s).
        rest_out: U's other rows, (out - s, rank), or None.
        rest_in: V's other columns, (rank, in - s), or None.
    """

    codes_out: Any
    codes_in: Any
    rest_out: Any
    rest_in: Any

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        transposed: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self._describe(in_features, out_features, rank, 0, transposed)
        options = {"device": device, "dtype": dtype}
        size = min(out_features, in_features)
        # Until it is loaded the scale is not-a-number, and so is every result.
        self.weight = _unset(rank, **options)
        # Buffers: a parameter of integers stops whoever asks gradients of all parameters.
        for name, shape in (("codes_out", (size, rank)), ("codes_in", (rank, size))):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.int8, device=device))
        tall, wide = out_features > size, in_features > size
        rest_out = _unset(out_features - size, rank, **options) if tall else None
        rest_in = _unset(rank, in_features - size, **options) if wide else None
        self.register_parameter("rest_out", rest_out)
        self.register_parameter("rest_in", rest_in)
        self.register_parameter("bias", _unset(out_features, **options) if bias else None)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (..., in) to (..., out) through rank numbers."""
        dtype = self.weight.dtype
        v, u = widen_codes(self.codes_in, dtype), widen_codes(self.codes_out, dtype)
        v = v if self.rest_in is None else torch.cat([v, self.rest_in], dim=1)
        u = u if self.rest_out is None else torch.cat([u, self.rest_out])
        return F.linear(F.linear(input, v) * self.weight, u, self.bias)

    def dense_weight(self) -> torch.Tensor:
        """What the layer stands for, (out, in): the product rounded once."""
        codes = Codes(self.weight, self.codes_out, self.codes_in, self.rest_out, self.rest_in)
        return quantised_product(codes)

    def extra_repr(self) -> str:
        """The sizes, for printing a model."""
        return f"{super().extra_repr()}, bits={BITS}"


def quantised_product(codes: Codes) -> torch.Tensor:
    """The dense weight (out, in) that codes stand for, rounded once to the scale's dtype."""
    u, v = codes.factors(torch.float64 if codes.scale.dtype.itemsize >= 4 else torch.float32)
    return (u @ v).to(codes.scale.dtype)
