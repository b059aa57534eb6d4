"""numpy arrays in Zarr v3: row chunks, a crc32c on each chunk, bfloat16 kept as its bits.

Arrays are cut along the first axis only, so the first k rows (the first k components of a layer)
are a prefix of the chunks. Zarr reads a missing chunk as zeros; here it is an error.
"""

from pathlib import Path
from typing import Any, cast

import numpy as np
import xxhash
import zarr
from zarr.codecs import Crc32cCodec

from storage.errors import ArtifactCorruptError, StorageError

ROWS_PER_CHUNK = 256
BYTES_PER_VECTOR_CHUNK = 1 << 20
LOGICAL_DTYPE = "logical_dtype"
STORED_AS = {"bfloat16": "uint16"}
"""Types that numpy and Zarr lack, and the type that holds their bits."""

# the whole metadata of a group; written here because Zarr takes 2 ms to write the same bytes
_GROUP = '{"zarr_format":3,"node_type":"group","attributes":{}}'
_KINDS = "biufc"  # bool, integers, floats, complex: the types with fixed-size plain bytes


def create_group(path: Path) -> None:
    """Make an empty Zarr v3 group at `path`, which must not exist."""
    path.mkdir()
    (path / "zarr.json").write_text(_GROUP)


def write_array(
    group_path: Path, name: str, array: np.ndarray[Any, Any], logical_dtype: str | None = None
) -> None:
    """Write one array into the group at `group_path`.

    Args:
        group_path: folder of a Zarr v3 group.
        name: name inside the group.
        array: any shape; bool, integer, float or complex.
        logical_dtype: "bfloat16" for a uint16 array that holds bf16 bits.

    Raises:
        StorageError: a type that cannot be stored, or a logical type that does not fit it.
    """
    logical = check_dtype(name, array, logical_dtype)
    stored = zarr.create_array(
        group_path / name,
        shape=array.shape,
        dtype=array.dtype.newbyteorder("<"),
        chunks=chunk_shape(array.shape, array.dtype.itemsize),
        compressors=[Crc32cCodec()],
        filters=None,
        fill_value=0,
        zarr_format=3,
        attributes={} if logical == array.dtype.name else {LOGICAL_DTYPE: logical},
        # one folder per array, not one per chunk row: fewer directories to make, sync and walk
        chunk_key_encoding={"name": "default", "separator": "."},
        config={"write_empty_chunks": True},
    )
    if array.size:
        stored[...] = array


def read_array(group_path: Path, name: str, rows: slice | None = None) -> np.ndarray[Any, Any]:
    """Read an array, or some of its rows without touching the chunks of the others.

    Args:
        group_path: folder of a Zarr v3 group.
        name: name inside the group.
        rows: a slice with step 1 along the first axis; None reads all.

    Returns:
        The stored array; bf16 comes as uint16.

    Raises:
        ArtifactCorruptError: the array, or a chunk that is needed, is missing or damaged.
    """
    where = group_path / name
    try:
        stored = zarr.open_array(where, mode="r", zarr_format=3)
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise ArtifactCorruptError(f"{where} is not a readable Zarr array: {error}") from error
    if rows is not None and (stored.ndim == 0 or rows.step not in (None, 1)):
        raise StorageError(f"{where} of shape {stored.shape} has no rows {rows}")
    _require_chunks(where, stored.shape, stored.chunks, rows)
    try:
        found = np.asarray(stored[... if rows is None else rows])
    except ValueError as error:
        raise ArtifactCorruptError(f"{where} has a damaged chunk: {error}") from error
    _require_chunks(where, stored.shape, stored.chunks, rows)  # or it went meanwhile, and is zeros
    return cast("np.ndarray[Any, Any]", found)


def check_dtype(name: str, array: np.ndarray[Any, Any], logical_dtype: str | None) -> str:
    """Return the logical type's name of an array about to be stored, or refuse it.

    Raises:
        StorageError: see `write_array`.
    """
    dtype = array.dtype
    if dtype.kind not in _KINDS:
        raise StorageError(
            f"array {name!r} has dtype {dtype}: only bool, integers, floats and complex"
        )
    if logical_dtype in (None, dtype.name):
        return dtype.name
    if STORED_AS.get(logical_dtype) != dtype.name:
        known = ", ".join(f"{logical} as {stored}" for logical, stored in STORED_AS.items())
        raise StorageError(
            f"array {name!r} has dtype {dtype.name}, which cannot hold {logical_dtype} "
            f"(known: {known})"
        )
    return logical_dtype


def array_digest(array: np.ndarray[Any, Any]) -> str:
    """Return xxh3_128 (hexadecimal) of an array's little-endian C-order bytes alone."""
    plain = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return xxhash.xxh3_128_hexdigest(plain.reshape(-1).view(np.uint8).data)


def chunk_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Return the chunk shape: 256 whole rows, or about 1 MiB of a vector."""
    if len(shape) < 2:
        return tuple(min(max(length, 1), BYTES_PER_VECTOR_CHUNK // itemsize) for length in shape)
    return (min(max(shape[0], 1), ROWS_PER_CHUNK), *(max(length, 1) for length in shape[1:]))


def _require_chunks(
    where: Path, shape: tuple[int, ...], chunks: tuple[int, ...], rows: slice | None
) -> None:
    """Raise unless every chunk file that `rows` needs is there (Zarr would read zeros)."""
    if 0 in shape:
        return
    if not shape:
        needed = [where / "c"]
    else:
        first, last, _ = (rows or slice(None)).indices(shape[0])
        rest = ".0" * (len(shape) - 1)
        needed = [
            where / f"c.{index}{rest}" for index in range(first // chunks[0], -(-last // chunks[0]))
        ]
        needed = needed if first < last else []
    for path in needed:
        if not path.is_file():
            raise ArtifactCorruptError(f"{where} lacks its chunk {path.name}")
