"""A product of two thin factors, U (out, rank) times V (rank, in)."""

from typing import ClassVar

import torch
import torch.nn.functional as F

from compress_core.forms.part import Entry, Kind, Run, Sizes, Slot, Tensors, wider


class Factors(Kind):
    """y = U (V x): `weight` is U, `factor_in` is V, which layers may share.

    With rank 0 both are empty and the product is zero. V reads the inputs whose columns are not
    kept.
    """

    words = "factors"
    keys: ClassVar = {"rank": int, "factor_in": str}
    slots: ClassVar = {
        "weight": Slot(along=0),
        "factor_in": Slot(inward=True, shared=True, along=1),
    }
    version, paired = 1, True

    @staticmethod
    def calls(entry: Entry) -> bool:
        """Never by itself: it is what a rank means where nothing else calls for it."""
        return False

    @staticmethod
    def shapes(entry: Entry, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """U and V."""
        rank = entry["rank"]
        return {"weight": (sizes.out, rank), "factor_in": (rank, sizes.rest)}

    @staticmethod
    def pack(u: torch.Tensor, v: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The tensors of a product of U (out, rank) and V (rank, in)."""
        return {"weight": u, "factor_in": v}

    @staticmethod
    def numbers(entry: Entry, sizes: Sizes) -> int:
        """All of both."""
        return int(entry["rank"]) * (sizes.out + sizes.rest)

    @staticmethod
    def apply(
        x: torch.Tensor, tensors: Tensors, sizes: Sizes, bias: torch.Tensor | None, run: Run
    ) -> torch.Tensor:
        """Through rank numbers."""
        return F.linear(F.linear(x, tensors["factor_in"]), tensors["weight"], bias)

    @staticmethod
    def pair(tensors: Tensors, sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
        """Its own."""
        return tensors["weight"], tensors["factor_in"]

    @staticmethod
    def dense(tensors: Tensors, sizes: Sizes) -> torch.Tensor:
        """The product."""
        u, v = tensors["weight"], tensors["factor_in"]
        return u.to(wider(u.dtype)) @ v.to(wider(u.dtype))
