"""What is kept of something: named tensors, and beside them a few words and numbers.

Whoever stores a record stores its tensors as they are; which numbers, in which dtype and packed
how, is decided here and in the functions that make records.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor


class Record(Protocol):
    """Something kept, read tensor by tensor."""

    @property
    def names(self) -> Collection[str]:
        """Names of its tensors."""
        ...

    @property
    def attrs(self) -> Mapping[str, Any]:
        """Its words and numbers, as JSON."""
        ...

    def tensor(self, name: str, rows: int | None = None) -> Tensor:
        """A tensor, or its first ``rows`` rows without the rest."""
        ...


@dataclass(frozen=True)
class Packed:
    """A record in memory.

    Attributes:
        tensors: By name.
        attrs: Words and numbers, as JSON.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    attrs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> Collection[str]:
        """Names of its tensors."""
        return self.tensors.keys()

    def tensor(self, name: str, rows: int | None = None) -> Tensor:
        """A tensor, or its first ``rows`` rows."""
        return self.tensors[name][:rows]


def pack_symmetric(matrix: Tensor) -> Tensor:
    """The lower triangle of a symmetric (n, n) matrix, row by row: (n (n + 1) / 2,)."""
    rows = matrix.cpu()
    packed = rows.new_empty(len(rows) * (len(rows) + 1) // 2)
    start = 0
    for i, row in enumerate(rows):
        packed[start : start + i + 1] = row[: i + 1]
        start += i + 1
    return packed


def unpack_symmetric(packed: Tensor, features: int) -> Tensor:
    """The symmetric (features, features) matrix of a lower triangle."""
    matrix = packed.new_empty(features, features)
    start = 0
    for i in range(features):
        row = packed[start : start + i + 1]
        matrix[i, : i + 1] = row
        matrix[: i + 1, i] = row
        start += i + 1
    return matrix
