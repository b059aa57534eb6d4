"""What stored tensors take: numbers as budgets count them, and bits in a file."""

import math
from collections import Counter
from collections.abc import Iterable

import torch

from compress_core.forms.coded import owner_of
from compress_core.forms.kinds import SLOTS, shapes_of
from compress_core.forms.names import FULL
from compress_core.forms.part import Entry, Sizes, Slot


def counted(tensors: Iterable[tuple[str, int, bool]]) -> int:
    """Numbers that stored tensors count as, which is what their layers' entries say.

    Args:
        tensors: Of each its key, its elements, and whether these are of 32 bits.
    """
    halves: Counter[str] = Counter()
    for key, elements, wide in tensors:
        stem, _, name = key.rpartition(".")
        owner = owner_of(name)
        # Codes and zeros of one tensor are rounded up together, whatever else adds up to wholes.
        whose = "" if owner == name else f"{stem}.{owner}"
        halves[whose] += SLOTS.get(name, Slot()).counted(elements, wide)
    return sum(-(-found // 2) for found in halves.values())


def bits_of(entry: Entry, sizes: Sizes, number_bits: int = FULL) -> int:
    """Bits in a file of all that a layer stores, but a bias that the dense one had.

    Args:
        entry: What config.json says of it.
        sizes: Its own.
        number_bits: Of the model's dtype, which what is not in codes has, and scales.
    """
    found = sizes.out * number_bits if entry.get("bias") else 0
    for name, shape in shapes_of(entry, sizes).items():
        slot = SLOTS[name]
        filed = slot.filed(torch.empty(0, dtype=slot.dtype), sizes, torch.float32)
        width = number_bits if slot.dtype is None else 8 * filed.itemsize
        found += math.prod(shape) * width
    return found
