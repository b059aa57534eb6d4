"""A whole weight, which the other parts correct; it pays where it is held in codes."""

from typing import ClassVar

import torch
import torch.nn.functional as F

from compress_core.forms.part import Entry, Kind, Run, Sizes, Slot, Tensors, wider


class Base(Kind):
    """y = B x: `base` is B (out, in)."""

    words = "a base"
    keys: ClassVar = {"base": bool}
    slots: ClassVar = {"base": Slot(along=1)}
    reads, version = "all", 4

    @staticmethod
    def calls(entry: Entry) -> bool:
        """Where it says so."""
        return bool(entry.get("base"))

    @staticmethod
    def shapes(entry: Entry, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """The matrix."""
        return {"base": (sizes.out, sizes.inputs)}

    @staticmethod
    def pack(base: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors of a base (out, in)."""
        return {"base": base}

    @staticmethod
    def numbers(entry: Entry, sizes: Sizes) -> int:
        """All of it."""
        return sizes.dense

    @staticmethod
    def apply(
        x: torch.Tensor, tensors: Tensors, sizes: Sizes, bias: torch.Tensor | None, run: Run
    ) -> torch.Tensor:
        """As the dense weight does."""
        return F.linear(x, tensors["base"], bias)

    @staticmethod
    def dense(tensors: Tensors, sizes: Sizes) -> torch.Tensor:
        """Itself."""
        return tensors["base"].to(wider(tensors["base"].dtype))
