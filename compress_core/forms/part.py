"""What every kind of part is: how it is stored, what it stands for, and how it maps inputs.

The files of this folder need PyTorch alone: their text is also written into the folder of every
compressed model, so that the model loads where nothing else of eigenpress is installed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

Entry = Mapping[str, Any]  # what config.json says of a layer
Tensors = Mapping[str, torch.Tensor]  # by the last part of their keys
Keep = Callable[[str, Sequence[torch.Tensor], Callable[[], torch.Tensor]], torch.Tensor]


class Sizes(NamedTuple):
    """Of a layer's dense weight: rows, columns, and how many of these are kept as they are."""

    out: int
    inputs: int
    taken: int = 0

    @property
    def rest(self) -> int:
        """Inputs whose columns are not kept."""
        return self.inputs - self.taken

    @property
    def dense(self) -> int:
        """Numbers of the dense weight."""
        return self.out * self.inputs


def as_it_is(tensor: torch.Tensor, sizes: Sizes | None = None) -> torch.Tensor:
    """The tensor."""
    return tensor


@dataclass(frozen=True)
class Slot:
    """A tensor that a part stores.

    Attributes:
        halves: What an element counts as, in halves of a number.
        dtype: In memory; None for the model's, which can be trained.
        fill: What it holds until it is loaded: nothing that could pass for a result.
        inward: Whether another tensor of the part stands between it and the outputs.
        shared: Whether another layer's can take its place.
        along: The axis of it along which neighbours share a scale where it is held in codes; None
            where it cannot be.
        load: From what its file holds to what is in memory.
        save: Back again.
    """

    halves: int = 2
    dtype: torch.dtype | None = None
    fill: float = math.nan
    inward: bool = False
    shared: bool = False
    along: int | None = None
    load: Callable[[torch.Tensor], torch.Tensor] = as_it_is
    save: Callable[[torch.Tensor, Sizes], torch.Tensor] = as_it_is

    @property
    def multiplied(self) -> bool:
        """Whether it holds numbers that inputs are multiplied by, or codes of some."""
        return self.dtype in (None, torch.int8)

    def filed(self, tensor: torch.Tensor, sizes: Sizes, dtype: torch.dtype) -> torch.Tensor:
        """What a file of a model in ``dtype`` holds."""
        return tensor.to(dtype) if self.dtype is None else self.save(tensor, sizes)

    def counted(self, elements: int, wide: bool) -> int:
        """Halves of a number that so many elements count as; of indices in 32 bits, twice."""
        return elements * self.halves * (2 if wide and self.dtype is torch.int32 else 1)


@dataclass(frozen=True)
class Run:
    """How a layer computes just now.

    Attributes:
        keep: Derives a tensor of others, or gives it again while those are what they were: of a
            name, the others, and what derives it.
        traced: Whether gradients are wanted or a graph is made: nothing that is kept is of use.
    """

    keep: Keep
    traced: bool


class Kind:
    """A kind of part. It has no state: what it works with are an entry, tensors and sizes.

    Attributes:
        words: What it is called where it cannot be.
        keys: What an entry says of it, and of which type that is.
        slots: Every tensor that it may store, by name; no two kinds have a name in common but for
            `weight`, which every layer has, so that a class that knows nothing of parts fails on
            its shape.
        reads: Which inputs it is given: "all", those whose columns are "taken", or the "rest".
        scattered: Whether it may be slower than the dense weight, which then takes its place.
        version: Of the format, from which on folders have it.
        fixed: Whether some of its numbers cannot be trained.
        paired: Whether two plain factors do the same.
    """

    words: ClassVar[str]
    keys: ClassVar[Mapping[str, type]]
    slots: ClassVar[Mapping[str, Slot]]
    reads: ClassVar[str] = "rest"
    scattered: ClassVar[bool] = False
    version: ClassVar[int]
    fixed: ClassVar[bool] = False
    paired: ClassVar[bool] = False

    @staticmethod
    def calls(entry: Entry) -> bool:
        """Whether an entry has such a part."""
        raise NotImplementedError

    @staticmethod
    def shapes(entry: Entry, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """Of the tensors that it stores then."""
        raise NotImplementedError

    @staticmethod
    def numbers(entry: Entry, sizes: Sizes) -> int:
        """How many those are; as budgets count, which is not always their elements."""
        raise NotImplementedError

    @classmethod
    def work(cls, entry: Entry, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> float:
        """Multiplications for one token, in those of a dense product; infinite if it cannot be."""
        return cls.numbers(entry, sizes)

    @staticmethod
    def kept_bytes(entry: Entry, sizes: Sizes) -> int:
        """Bytes that it keeps in memory, beside what is stored, after a forward by parts."""
        return 0

    @staticmethod
    def masks(tensors: Tensors, sizes: Sizes) -> dict[str, torch.Tensor]:
        """Where in the weight the numbers of a tensor are, bool (out, in), if that is fixed."""
        return {}

    @staticmethod
    def check(tensors: Tensors, sizes: Sizes) -> None:
        """Raise ValueError where stored integers name what is not there."""

    @staticmethod
    def apply(
        x: torch.Tensor, tensors: Tensors, sizes: Sizes, bias: torch.Tensor | None, run: Run
    ) -> torch.Tensor:
        """What it makes of inputs (..., n) that it reads, (..., out), and the bias if given."""
        raise NotImplementedError

    @staticmethod
    def pair(tensors: Tensors, sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors (out, r) and (r, n) that do the same to what it reads, if it is ``paired``."""
        raise NotImplementedError

    @staticmethod
    def dense(tensors: Tensors, sizes: Sizes) -> torch.Tensor:
        """What it stands for, (out, n), in a dtype that rounds little of it away."""
        raise NotImplementedError


def wider(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which what stored numbers stand for is put together, to be rounded once."""
    return torch.float64 if dtype.itemsize >= 4 else torch.float32
