"""Tensors of a layer that are held in codes: what stands in the place of each, and back again.

It is a coat over whatever a kind of part stores: a kind sees the tensors that the codes stand for.
In the place of a tensor are three: its scales, under its own name, and its codes and zeros.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch

from compress_core.forms.codes import (
    Coded,
    coded_bits,
    groups_of,
    is_packed,
    pack_codes,
    packed_bytes,
    unpack_codes,
)
from compress_core.forms.names import FULL
from compress_core.forms.part import Keep, Tensors

CODES, ZEROS = "_codes", "_zeros"  # behind the name of the tensor
OF_CODES = 4  # version of the format from which on tensors may be in codes


class Rows(NamedTuple):
    """A tensor as a matrix (rows, length), of which neighbours in a row may share a scale.

    Attributes:
        shape: Of the tensor.
        along: The axis of it that a row runs along.
    """

    shape: tuple[int, ...]
    along: int

    @property
    def length(self) -> int:
        """Numbers in a row."""
        return self.shape[self.along]

    @property
    def rows(self) -> int:
        """How many there are."""
        return math.prod(self._others)

    @property
    def _others(self) -> tuple[int, ...]:
        return self.shape[: self.along] + self.shape[self.along + 1 :]

    def matrix(self, tensor: torch.Tensor) -> torch.Tensor:
        """The matrix of a tensor."""
        return tensor.movedim(self.along, -1).reshape(self.rows, self.length)

    def tensor(self, matrix: torch.Tensor) -> torch.Tensor:
        """The tensor of a matrix."""
        return matrix.reshape(*self._others, self.length).movedim(-1, self.along)


class CodeLayout(NamedTuple):
    """How a tensor is held in codes.

    Attributes:
        of: The tensor as rows.
        bits: Of a code.
        group: Neighbours that share a scale.
    """

    of: Rows
    bits: int
    group: int

    @property
    def groups(self) -> int:
        """Of all rows together."""
        return self.of.rows * groups_of(self.of.length, self.group)

    def shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """Of the three tensors that stand in the place of the one of a name."""
        rows, length = self.of.rows, self.of.length
        return {
            name: (rows, groups_of(length, self.group)),
            name + CODES: (packed_bytes(rows * length, self.bits),),
            name + ZEROS: (packed_bytes(self.groups, self.bits),),
        }

    def numbers(self) -> int:
        """Numbers of 16 bits that take the same room, scales one each."""
        bits = coded_bits(self.of.rows, self.of.length, self.bits, self.group)
        return -(-bits // FULL)

    def encode(self, name: str, coded: Coded) -> dict[str, torch.Tensor]:
        """The three tensors of a name.

        Raises:
            ValueError: Codes or zeros are of other bits, or of another shape than the tensor.
        """
        rows, groups = self.shapes(name)[name]
        shapes = [tuple(part.shape) for part in coded]
        if shapes != [(rows, groups), (rows, self.of.length), (rows, groups)]:
            raise ValueError(f"{name} {self.of.shape} in groups of {self.group}, not {shapes}")
        if max(int(part.max()) for part in coded[1:]) >> self.bits:
            raise ValueError(f"{name} has codes or zeros of more than {self.bits} bits")
        return {
            name: coded.scales,
            name + CODES: pack_codes(coded.codes, self.bits),
            name + ZEROS: pack_codes(coded.zeros, self.bits),
        }

    def decode(self, name: str, tensors: Tensors) -> torch.Tensor:
        """The tensor of a name, in the dtype of its scales."""
        rows, length = self.of.rows, self.of.length
        codes = unpack_codes(tensors[name + CODES], rows * length, self.bits).view(rows, length)
        zeros = unpack_codes(tensors[name + ZEROS], self.groups, self.bits).view(rows, -1)
        return self.of.tensor(Coded(tensors[name], codes, zeros).decoded(self.group))

    def check(self, name: str, tensors: Tensors) -> None:
        """Raise ValueError where codes or zeros are no bytes, or have bits behind their end."""
        counts = {name + CODES: math.prod(self.of.shape), name + ZEROS: self.groups}
        for part, count in counts.items():
            if tensors[part].dtype is not torch.uint8:
                raise ValueError(f"{part} is of {tensors[part].dtype}, not of bytes")
            if not is_packed(tensors[part], count, self.bits):
                raise ValueError(f"{part} has bits behind its end")


Layouts = Mapping[str, CodeLayout]  # by the names of tensors


def owner_of(name: str) -> str:
    """The tensor that a stored one stands for, or stands for in part."""
    return name.removesuffix(CODES).removesuffix(ZEROS)


def decoded(layouts: Layouts, tensors: Tensors, keep: Keep | None = None) -> Tensors:
    """What is stored as what it stands for: numbers in codes decoded, all else as it is.

    Args:
        layouts: Of the tensors that are in codes.
        tensors: All that a layer stores.
        keep: Decodes, or gives again what was decoded; without it everything is decoded anew.
    """
    if not layouts:
        return tensors
    found = _uncoded(layouts, tensors)
    for name, layout in layouts.items():
        if keep is None:
            found[name] = layout.decode(name, tensors)
        else:
            parts = [tensors[part] for part in layout.shapes(name)]
            found[name] = keep(name, parts, partial(layout.decode, name, tensors))
    return found


def outlined(layouts: Layouts, tensors: Tensors) -> Tensors:
    """The same for who looks at integers alone: of numbers in codes there is but the shape."""
    shapes = {name: layout.of.shape for name, layout in layouts.items()}
    outlines = {name: tensors[name].new_empty(shapes[name], device="meta") for name in shapes}
    return _uncoded(layouts, tensors) | outlines


def _uncoded(layouts: Layouts, tensors: Tensors) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if owner_of(name) not in layouts}
