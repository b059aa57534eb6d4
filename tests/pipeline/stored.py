"""What a model's files hold, counted as a budget counts it."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


def numbers_in(folder: str | Path) -> tuple[int, int]:
    """Numbers of 16 bits and bytes in a folder's tensors; 16 bits of pivot rows are one number."""
    tensors = _tensors(folder)
    wide = sum(t.numel() for t in tensors if t.dtype is not torch.uint8)
    return wide + marks_in(folder), sum(t.numel() * t.element_size() for t in tensors)


def marks_in(folder: str | Path) -> int:
    """How many of the numbers say which rows are pivots, and take part in no product."""
    return sum(t.numel() for t in _tensors(folder) if t.dtype is torch.uint8) // 2


def _tensors(folder: str | Path) -> list[Tensor]:
    return [t for f in Path(folder).glob("*.safetensors") for t in load_file(f).values()]
