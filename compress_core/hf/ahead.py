"""A model folder that is read a block ahead: while one block computes, the next leaves the disk."""

import os
import struct
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from compress_core.hf.checkpoint import Checkpoint, tensor_headers

PIECE = 128 << 10
"""Bytes of a file that the kernel is told of at once: of more it may read only the beginning."""


class AheadCheckpoint(Checkpoint):
    """The tensors of a model folder by name; those of the block behind the one that is read come.

    When the last tensor of a block has been read, a thread begins with the next block. On a CPU it
    has the system read the block's bytes into its cache, from which tensors are mapped: memory of
    nobody, given up where it is needed. For a CUDA device it reads the tensors themselves into
    pinned memory, from which they are copied without a stop on the way; that is one block, of which
    PyTorch makes up to two and keeps them, in the computer's memory and not in the device's.

    Args:
        folder: As of :class:`Checkpoint`.
        blocks: Keys of the tensors that are read of each block, in order.
        pinned: Whether tensors are held in pinned memory.

    Raises:
        ModelError: As of :class:`Checkpoint`; in :meth:`read` also for what was read before.
    """

    def __init__(self, folder: Path, blocks: Sequence[Sequence[str]], pinned: bool) -> None:
        super().__init__(folder)
        self._blocks = [frozenset(keys) for keys in blocks]
        self._block_of = {key: block for block, keys in enumerate(self._blocks) for key in keys}
        self._pinned = pinned
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._current, self._left = -1, set[str]()  # block that is read, keys that are to come
        self._ahead, self._coming = -1, Future[dict[str, Tensor]]()  # block that comes, and it
        self._here: dict[str, Tensor] = {}  # what is left of it when it is the one that is read

    def read(self, key: str) -> Tensor:
        """As of :class:`Checkpoint`; what was read before is handed out once."""
        block = self._block_of.get(key)
        if block is None:
            return super().read(key)
        if block != self._current or not self._left:
            self._enter(block)
        found = self._here.pop(key, None)
        tensor = super().read(key) if found is None else found
        self._left.discard(key)
        if not self._left:
            self._begin(block + 1)
        return tensor

    def _enter(self, block: int) -> None:
        """A block is read, from its first tensor on."""
        self._current, self._left, self._here = block, set(self._blocks[block]), {}
        if block == self._ahead and self._pinned:
            self._here = self._coming.result()
        if block == self._ahead:
            self._ahead = -1

    def _begin(self, block: int) -> None:
        """Has a block read, unless it was already; one that was read for nothing is let go."""
        if block == self._ahead or block == len(self._blocks):
            return
        self._coming.cancel()
        self._ahead, self._coming = block, self._thread.submit(self._fetch, block)

    def _fetch(self, block: int) -> dict[str, Tensor]:
        keys = sorted(self._blocks[block])
        if self._pinned:
            return {key: super(AheadCheckpoint, self).read(key).pin_memory() for key in keys}
        if hasattr(os, "posix_fadvise"):  # not on macOS
            for file in sorted({self._file_of[key] for key in keys}):
                with suppress(OSError):  # told when it is read, if it cannot be
                    _tell(file, self._blocks[block])
        return {}


def _tell(file: Path, keys: Collection[str]) -> None:
    """Tells the system that the bytes of those tensors that are in a file will be read."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        for key, entry in tensor_headers(file).items():
            if key not in keys:
                continue
            first, last = (8 + length + offset for offset in entry["data_offsets"])
            for place in range(first, last, PIECE):
                size = min(PIECE, last - place)
                os.posix_fadvise(stream.fileno(), place, size, os.POSIX_FADV_WILLNEED)
