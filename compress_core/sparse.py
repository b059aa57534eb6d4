"""A sparse matrix in few bytes: its values, and a bit mask or 16-bit columns for where they are.

This file needs PyTorch alone: its text is also written into the folder of a model that has sparse
parts, so that the model loads where nothing else of eigenpress is installed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

MOST_COLUMNS = 65536  # that a 16-bit column can name
PLACES = ("sparse_bits", "sparse_columns", "sparse_counts")  # tensors that say where entries are


@dataclass(frozen=True)
class Sparse:
    """Some entries of an (out, in) matrix, whose others are zero.

    Attributes:
        mask: Which entries are there, (out, in) bool; an entry that is there may be zero.
        values: Theirs, row by row, (nonzeros,).
    """

    mask: torch.Tensor
    values: torch.Tensor

    @classmethod
    def of(cls, matrix: torch.Tensor, mask: torch.Tensor) -> "Sparse":
        """The entries of ``matrix`` where ``mask`` is set, both (out, in)."""
        return cls(mask, matrix[mask])

    @property
    def nonzeros(self) -> int:
        """Entries that are there."""
        return self.values.numel()

    def dense(self) -> torch.Tensor:
        """The matrix (out, in), in the dtype of the values."""
        matrix = torch.zeros(self.mask.shape, dtype=self.values.dtype, device=self.values.device)
        return matrix.masked_scatter(self.mask, self.values)


def index_layout(out_features: int, in_features: int, nonzeros: int) -> str:
    """How places are stored, "bitmask" or "csr", whichever takes fewer bytes."""
    bits = -(-out_features * in_features // 8)
    rows = 2 * nonzeros + 4 * out_features
    return "csr" if in_features <= MOST_COLUMNS and rows < bits else "bitmask"


def index_bytes(out_features: int, in_features: int, nonzeros: int) -> int:
    """Bytes that the places take in that layout."""
    if index_layout(out_features, in_features, nonzeros) == "csr":
        return 2 * nonzeros + 4 * out_features
    return -(-out_features * in_features // 8)


def pack(mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """The places of a mask (out, in) as tensors: the smaller of two layouts.

    Returns:
        Either "sparse_bits", uint8 (ceil(out * in / 8),), the mask row by row, lowest bit first, or
        "sparse_columns", int16 (nonzeros,), columns row by row with 65535 as -1, and
        "sparse_counts", int32 (out,), entries in each row.
    """
    rows, columns = mask.shape
    if index_layout(rows, columns, int(mask.sum())) == "csr":
        counts = mask.sum(dim=1, dtype=torch.int32)
        return {"sparse_columns": narrow(mask.nonzero()[:, 1]), "sparse_counts": counts}
    return {"sparse_bits": pack_bits(mask)}


def pack_bits(flags: torch.Tensor) -> torch.Tensor:
    """Flags (bool, any shape) as bits, uint8 (ceil(n / 8),), row by row, lowest bit first."""
    flat = flags.flatten()
    padded = torch.nn.functional.pad(flat.to(torch.uint8), (0, -flat.numel() % 8)).view(-1, 8)
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=flags.device)
    return (padded * powers).sum(dim=1, dtype=torch.uint8)


def unpack_bits(packed: torch.Tensor, count: int) -> torch.Tensor:
    """The first ``count`` flags that :func:`pack_bits` made bits of, bool (count,)."""
    return _bits(packed)[:count]


def unpack(
    parts: Mapping[str, Any], out_features: int, in_features: int, nonzeros: int | None = None
) -> torch.Tensor:
    """The mask (out, in) bool that :func:`pack` made ``parts`` of.

    Args:
        parts: Places in either layout; columns may be wider than they are stored.
        out_features: Rows.
        in_features: Columns.
        nonzeros: How many entries there must be, where that is known.

    Raises:
        ValueError: The parts are of another size, or name columns that are not there, twice or out
            of order.
    """
    size = out_features * in_features
    if "sparse_bits" in parts:
        if (found := parts["sparse_bits"].numel()) != -(-size // 8):
            raise ValueError(f"a bit mask of {found} bytes for {size} entries")
        flat = _bits(parts["sparse_bits"])
        if bool(flat[size:].any()):
            raise ValueError("a bit mask with bits behind its end")
        mask = flat[:size].view(out_features, in_features)
    else:
        mask = _marked(parts["sparse_columns"], parts["sparse_counts"], out_features, in_features)
    if nonzeros is not None and (found := int(mask.sum())) != nonzeros:
        raise ValueError(f"places of {found} entries for {nonzeros} values")
    return mask


def positions(
    parts: Mapping[str, Any], out_features: int, in_features: int, nonzeros: int
) -> torch.Tensor:
    """Where the entries are in the matrix read row by row, int64 (nonzeros,), nothing checked.

    No shape depends on what the parts say, so that it can be part of a compiled graph.
    """
    if "sparse_bits" in parts:
        flat = _bits(parts["sparse_bits"])[: out_features * in_features]
        nth = torch.arange(1, nonzeros + 1, device=flat.device)
        return torch.searchsorted(flat.cumsum(0), nth)
    counts = parts["sparse_counts"].long()
    rows = torch.arange(out_features, device=counts.device)
    rows = rows.repeat_interleave(counts, output_size=nonzeros)
    return rows * in_features + widen(parts["sparse_columns"])


def narrow(columns: torch.Tensor) -> torch.Tensor:
    """Columns as int16, in which 65535 is -1."""
    return torch.where(columns > 32767, columns - MOST_COLUMNS, columns).to(torch.int16)


def widen(columns: torch.Tensor) -> torch.Tensor:
    """Columns as int32, from what :func:`narrow` gave or from a wider dtype."""
    return columns.to(torch.int32) & (MOST_COLUMNS - 1)


def _bits(packed: torch.Tensor) -> torch.Tensor:
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=packed.device)
    return packed[:, None].bitwise_and(powers).ne(0).flatten()


def _marked(
    stored: torch.Tensor, counts: torch.Tensor, out_features: int, in_features: int
) -> torch.Tensor:
    columns, counts = widen(stored).long(), counts.long()
    if counts.numel() != out_features or bool((counts < 0).any()):
        raise ValueError(f"{counts.numel()} counts, or negative ones, for {out_features} rows")
    if int(counts.sum()) != columns.numel():
        raise ValueError(f"{columns.numel()} columns in rows that count {int(counts.sum())}")
    if columns.numel() and int(columns.max()) >= in_features:
        raise ValueError(f"column {int(columns.max())} of {in_features}")
    rows = torch.arange(out_features, device=counts.device).repeat_interleave(counts)
    places = rows * in_features + columns
    if bool((places.diff() <= 0).any()):
        raise ValueError("a column that is named twice, or out of order, in its row")
    mask = torch.zeros(out_features * in_features, dtype=torch.bool, device=counts.device)
    mask[places] = True
    return mask.view(out_features, in_features)
