"""Where hidden states are kept between blocks: in memory, or on disk where they do not fit."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
from torch import Tensor


@dataclass(frozen=True)
class Room:
    """Gives place to hidden states.

    Attributes:
        most: Bytes of one tensor that may be in memory; a larger one is a file mapped into it,
            whose pages the system writes out and takes back as it needs to. None for any.
        folder: Where such files are; they have no name, so none is left by whatever ends a process.
        on_device: Bytes of one model's that an accelerator may keep while it is evaluated.
    """

    most: int | None = None
    folder: Path | None = None
    on_device: int = 0

    def held(self, nbytes: int) -> int:
        """Bytes of memory that a tensor of so many takes."""
        return 0 if self.most is not None and nbytes > self.most else nbytes

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor on the CPU with nothing in it yet."""
        numbers = torch.Size(shape).numel()
        if self.held(numbers * dtype.itemsize) == numbers * dtype.itemsize:
            return torch.empty(tuple(shape), dtype=dtype)
        with NamedTemporaryFile(dir=self.folder, prefix="hidden-") as file:
            _reserve(file.fileno(), numbers * dtype.itemsize)
            mapped = torch.from_file(file.name, shared=True, size=numbers, dtype=dtype)
        return mapped.view(tuple(shape))

    def copy(self, states: Tensor) -> Tensor:
        """The same numbers once more."""
        return self.empty(states.shape, states.dtype).copy_(states)


def _reserve(file: int, size: int) -> None:
    """Raises OSError where the disk is too full; a mapped file would end the process instead."""
    if hasattr(os, "posix_fallocate"):  # not on macOS
        os.posix_fallocate(file, 0, size)
