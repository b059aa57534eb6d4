"""Numbers held as codes of a few bits: a scale and a zero for every group of neighbours in a row.

A number is scale · (code - zero), with codes and zeros whole and in [0, 2^bits). A row's last group
may be shorter than the others. Codes and zeros are packed without a gap: those of 6 bits as their
lower 4 and their upper 2, and so on, each piece of 4, 2 or 1 bits as many to a byte as fit, lowest
first.
"""

from functools import reduce
from typing import NamedTuple

import torch
from torch.nn import functional

from compress_core.forms.names import FULL


class Coded(NamedTuple):
    """A matrix in codes.

    Attributes:
        scales: (rows, groups), floating.
        codes: (rows, length), uint8.
        zeros: (rows, groups), uint8.
    """

    scales: torch.Tensor
    codes: torch.Tensor
    zeros: torch.Tensor

    def decoded(self, group: int) -> torch.Tensor:
        """What it stands for, (rows, length), in the dtype of the scales, which may be trained."""
        (rows, length), (_, groups) = self.codes.shape, self.scales.shape
        size = max(1, min(group, length))
        codes = functional.pad(self.codes, (0, groups * size - length)).view(rows, groups, size)
        numbers, scales = codes.to(self.scales.dtype), self.scales[:, :, None]
        numbers.sub_(self.zeros[:, :, None])
        trained = torch.is_grad_enabled() and scales.requires_grad
        numbers = numbers * scales if trained else numbers.mul_(scales)  # in as little memory
        return numbers.flatten(1)[:, :length]


def groups_of(length: int, group: int) -> int:
    """Groups in a row."""
    return -(-length // group)


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that so many codes take."""
    return sum(-(-count * piece // 8) for piece, _ in _pieces(bits))


def coded_bits(rows: int, length: int, bits: int, group: int, scale_bits: int = FULL) -> int:
    """Bits that a coded matrix takes, scales and zeros among them."""
    groups = rows * groups_of(length, group)
    packed = packed_bytes(rows * length, bits) + packed_bytes(groups, bits)
    return 8 * packed + groups * scale_bits


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Whole numbers in [0, 2^bits), of any shape, as bytes: uint8 (packed_bytes(count, bits),)."""
    flat = codes.flatten().to(torch.uint8)
    return torch.cat(
        [_pack(flat >> shift & (2**piece - 1), piece) for piece, shift in _pieces(bits)]
    )


def unpack_codes(packed: torch.Tensor, count: int, bits: int) -> torch.Tensor:
    """The numbers that :func:`pack_codes` was given: uint8 (count,)."""
    found, start = [], 0
    for piece, shift in _pieces(bits):
        stop = start + -(-count * piece // 8)
        found.append(_unpack(packed[start:stop], piece)[:count] << shift)
        start = stop
    return reduce(torch.bitwise_or, found)


def is_packed(packed: torch.Tensor, count: int, bits: int) -> bool:
    """Whether bytes, as many as so many codes take, have nothing behind the last one."""
    stop = 0
    for piece, _ in _pieces(bits):
        stop += -(-count * piece // 8)
        used = count * piece % 8
        if used and int(packed[stop - 1]) >> used:
            return False
    return True


def _pieces(bits: int) -> list[tuple[int, int]]:
    """The powers of two that a code's bits are taken apart into, with the place of each."""
    pieces, shift = [], 0
    for piece in (8, 4, 2, 1):
        if bits & piece:
            pieces.append((piece, shift))
            shift += piece
    return pieces


def _pack(values: torch.Tensor, piece: int) -> torch.Tensor:
    many = 8 // piece
    table = functional.pad(values, (0, -len(values) % many)).view(-1, many)
    byte = table[:, 0].clone()
    for place in range(1, many):
        byte |= table[:, place] << (place * piece)
    return byte


def _unpack(packed: torch.Tensor, piece: int) -> torch.Tensor:
    """Every byte's pieces in bytes of their own."""
    width = 8
    while width > piece:
        width //= 2
        # Each in two halves, as both bytes of one integer, of which the lower byte lies first.
        wide = packed.to(torch.int16)
        halves = (wide << (8 - width)).bitwise_or_(wide).bitwise_and_((2**width - 1) * 0x101)
        packed = halves.view(torch.uint8)
    return packed
