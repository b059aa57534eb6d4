"""A safetensors file of tensors that come one at a time and are not held.

The format has its header first, with the places of all tensors in it, so what comes is put into a
file beside it and copied behind the header when all are there.
"""

import json
import struct
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from compress_core.hf.checkpoint import DTYPES

PIECE = 1 << 24  # bytes copied at a time
ALIGNED = 8  # the header's length is a multiple of it
ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL")
"""Of dtypes in a file."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Spool:
    """Takes tensors and writes the file that ``safetensors.torch.save_file`` would.

    Args:
        file: The file to make; until :meth:`close` its tensors lie in another one beside it.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._beside = file.with_suffix(".spool")
        self._spool = self._beside.open("wb+")
        self._tensors: dict[str, tuple[torch.dtype, list[int], int, int]] = {}
        self.nbytes = 0

    @property
    def keys(self) -> list[str]:
        """Those of the tensors so far."""
        return list(self._tensors)

    def add(self, key: str, tensor: Tensor) -> None:
        """Takes one tensor."""
        self._spool.write(raw_bytes(tensor))
        self._tensors[key] = tensor.dtype, list(tensor.shape), self.nbytes, tensor.nbytes
        self.nbytes += tensor.nbytes

    def close(self) -> None:
        """Writes the file."""
        ordered = sorted(
            self._tensors.items(), key=lambda item: (ORDER.index(NAMES[item[1][0]]), item[0])
        )
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for key, (dtype, shape, _, nbytes) in ordered:
            place = [end, end := end + nbytes]
            header[key] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": place}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % ALIGNED)
        with self._spool, self._file.open("wb") as target:
            target.write(struct.pack("<Q", len(text)) + text)
            for _, (_, _, start, nbytes) in ordered:
                _copy(self._spool, start, nbytes, target)
        self._beside.unlink()


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row by row."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _copy(source: BinaryIO, start: int, count: int, target: BinaryIO) -> None:
    source.seek(start)
    while count:
        piece = source.read(min(count, PIECE))
        target.write(piece)
        count -= len(piece)
