"""Two factors in 8 bits, as far as both are as long: symmetric codes with a scale per component."""

from typing import ClassVar

import torch
import torch.nn.functional as F

from compress_core.forms.part import Entry, Kind, Run, Sizes, Slot, Tensors, wider
from compress_core.quantise import Codes, quantise, widen_codes

BITS = 8


class EightBits(Kind):
    """y = U diag(scale) (V x), U and V mostly 8-bit codes, of which 128 stands for 1.

    Codes stay int8 in memory; each forward widens them, which takes a pass over both factors and
    the memory of one layer's at a time. They are fixed: only scale, rest and bias can be trained,
    gradients pass through to the inputs, and LoRA trains on top.

    The scale (rank,) is called `weight`, as the out-factor is and for the same reason, and because
    programs ask a layer's `weight` for dtype and device. With s = min(out, in), `codes_out` is
    int8 (s, rank), `codes_in` int8 (rank, s), and `rest_out` (out - s, rank) or `rest_in`
    (rank, in - s) is what is left of the longer factor.
    """

    words = "factors in 8 bits"
    keys: ClassVar = {"rank": int, "bits": int}
    slots: ClassVar = {
        "weight": Slot(),
        "rest_out": Slot(),
        "rest_in": Slot(),
        # Buffers: a parameter of integers stops whoever asks gradients of all parameters.
        "codes_out": Slot(halves=1, dtype=torch.int8, fill=0),
        "codes_in": Slot(halves=1, dtype=torch.int8, fill=0),
    }
    version, fixed = 3, True

    @staticmethod
    def calls(entry: Entry) -> bool:
        """Where a rank is in 8 bits."""
        return entry.get("bits") == BITS

    @staticmethod
    def shapes(entry: Entry, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """Scale, codes, and what is left of the longer factor."""
        rank, size = entry["rank"], min(sizes.out, sizes.rest)
        shapes = {"weight": (rank,), "codes_out": (size, rank), "codes_in": (rank, size)}
        if sizes.out > size:
            shapes["rest_out"] = (sizes.out - size, rank)
        if sizes.rest > size:
            shapes["rest_in"] = (rank, sizes.rest - size)
        return shapes

    @staticmethod
    def pack(u: torch.Tensor, v: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The tensors that stand for a product of U (out, rank) and V (rank, in)."""
        codes = quantise(u, v, dtype)
        tensors = {"weight": codes.scale, "codes_out": codes.codes_out, "codes_in": codes.codes_in}
        rests = {"rest_out": codes.rest_out, "rest_in": codes.rest_in}
        return tensors | {name: rest for name, rest in rests.items() if rest is not None}

    @staticmethod
    def numbers(entry: Entry, sizes: Sizes) -> int:
        """Those of 16 bits that take the same room: two codes count as one."""
        return int(entry["rank"]) * (max(sizes.out, sizes.rest) + 1)

    @classmethod
    def work(cls, entry: Entry, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> float:
        """Those of two factors."""
        return int(entry["rank"]) * (sizes.out + sizes.rest)

    @staticmethod
    def apply(
        x: torch.Tensor, tensors: Tensors, sizes: Sizes, bias: torch.Tensor | None, run: Run
    ) -> torch.Tensor:
        """Through rank numbers."""
        scale = tensors["weight"]
        v = widen_codes(tensors["codes_in"], scale.dtype)
        u = widen_codes(tensors["codes_out"], scale.dtype)
        v = torch.cat([v, tensors["rest_in"]], dim=1) if "rest_in" in tensors else v
        u = torch.cat([u, tensors["rest_out"]]) if "rest_out" in tensors else u
        return F.linear(F.linear(x, v) * scale, u, bias)

    @staticmethod
    def dense(tensors: Tensors, sizes: Sizes) -> torch.Tensor:
        """The product."""
        u, v = codes_of(tensors).factors(wider(tensors["weight"].dtype))
        return u @ v


def codes_of(tensors: Tensors) -> Codes:
    """The codes that tensors hold."""
    return Codes(
        tensors["weight"],
        tensors["codes_out"],
        tensors["codes_in"],
        tensors.get("rest_out"),
        tensors.get("rest_in"),
    )
