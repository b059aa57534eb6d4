"""Places of sparse entries: what is packed comes back, in the fewer bytes, or is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress_core.sparse import (
    MOST_COLUMNS,
    Sparse,
    index_bytes,
    index_layout,
    narrow,
    pack,
    positions,
    unpack,
    widen,
)


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    """Masks of any shape and density, wide ones as well."""
    rows, columns = draw(st.integers(1, 9)), draw(st.sampled_from([1, 7, 8, 33, 200, 40000, 70000]))
    density = draw(st.sampled_from([0.0, 0.002, 0.03, 0.3, 1.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return torch.rand(rows, columns, generator=generator) < density


@given(masks())
@settings(max_examples=60, deadline=None)
def test_what_is_packed_comes_back_in_the_fewer_bytes(mask: Tensor) -> None:
    rows, columns = mask.shape
    count, parts = int(mask.sum()), pack(mask)
    assert torch.equal(unpack(parts, rows, columns), mask)
    assert torch.equal(unpack(parts, rows, columns, count), mask)
    where = positions(parts, rows, columns, count)
    assert torch.equal(where, mask.flatten().nonzero().flatten())
    taken = sum(part.nbytes for part in parts.values())
    bits, csr = -(-rows * columns // 8), 2 * count + 4 * rows
    assert taken == index_bytes(rows, columns, count)
    assert taken == (min(bits, csr) if columns <= MOST_COLUMNS else bits)
    assert ("sparse_bits" in parts) == (index_layout(rows, columns, count) == "bitmask")
    if "sparse_columns" in parts:  # as they are in memory
        wide = {**parts, "sparse_columns": widen(parts["sparse_columns"])}
        assert int(wide["sparse_columns"].min() if count else 0) >= 0
        assert torch.equal(unpack(wide, rows, columns), mask)


def test_columns_survive_16_bits() -> None:
    columns = torch.tensor([0, 32767, 32768, MOST_COLUMNS - 1])
    assert narrow(columns).tolist() == [0, 32767, -32768, -1]
    assert widen(narrow(columns)).tolist() == columns.tolist()
    assert widen(columns.to(torch.int32)).tolist() == columns.tolist()


@given(masks())
@settings(max_examples=20, deadline=None)
def test_a_sparse_matrix_is_its_entries(mask: Tensor) -> None:
    matrix = torch.randn(mask.shape)
    sparse = Sparse.of(matrix, mask)
    assert sparse.nonzeros == int(mask.sum())
    assert torch.equal(sparse.dense(), matrix * mask)


def columns_of(columns: list[int], counts: list[int]) -> dict[str, Tensor]:
    return {
        "sparse_columns": torch.tensor(columns, dtype=torch.int16),
        "sparse_counts": torch.tensor(counts, dtype=torch.int32),
    }


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"sparse_bits": torch.zeros(3, dtype=torch.uint8)}, "a bit mask of 3 bytes for 30 entr"),
        ({"sparse_bits": torch.tensor([0, 0, 0, 64], dtype=torch.uint8)}, "behind its end"),
        ({"sparse_bits": torch.tensor([3, 0, 0, 0], dtype=torch.uint8)}, "2 entries for 3 values"),
        (columns_of([0, 1, 2], [2, 1]), "2 counts, or negative ones, for 3 rows"),
        (columns_of([0, 1, 2], [4, -1, 0]), "or negative ones"),
        (columns_of([0, 1, 2], [2, 2, 0]), "3 columns in rows that count 4"),
        (columns_of([0, 1, 10], [2, 1, 0]), "column 10 of 10"),
        (columns_of([0, 1, -1], [2, 1, 0]), "column 65535 of 10"),
        (columns_of([0, 1, 1], [1, 2, 0]), "named twice, or out of order"),
        (columns_of([0, 2, 1], [1, 2, 0]), "named twice, or out of order"),
        (columns_of([0, 2], [0, 2, 0]), "places of 2 entries for 3 values"),
    ],
)
def test_damaged_places_are_refused(parts: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unpack(parts, 3, 10, nonzeros=3)
