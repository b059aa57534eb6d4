"""Rows of parquet and Arrow files and of datasets, read in place, without a cache."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compress_core.errors import TextError
from compress_core.hf.refusing import refusing
from compress_core.hf.row import Row, reading

_ROWS_AT_ONCE = 1024


def parquet_rows(path: Path, packed: str) -> Iterator[Row]:
    """The rows of a parquet file.

    Raises:
        TextError: It is damaged.
    """
    import pyarrow.parquet as pq

    with reading(path, " as parquet"), pq.ParquetFile(path) as file:
        yield from _numbered(file.iter_batches(batch_size=_ROWS_AT_ONCE))


def arrow_rows(path: Path, packed: str) -> Iterator[Row]:
    """The rows of an Arrow file, streamed (as datasets writes them) or not.

    Raises:
        TextError: It is damaged.
    """
    import pyarrow as pa

    with reading(path, " as Arrow"), pa.memory_map(str(path)) as file:
        try:
            batches = iter(pa.ipc.open_stream(file))
        except pa.ArrowInvalid:
            reader = pa.ipc.open_file(file)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        yield from _numbered(batches)


def read_saved(folder: Path) -> Iterator[Row]:
    """The rows of a folder that ``datasets.save_to_disk`` made.

    Raises:
        TextError: It holds several splits, or cannot be read.
    """
    splits = saved_splits(folder)
    if len(splits) > 1:
        raise TextError(
            f"{folder} holds the splits {', '.join(splits)}: give one of them, "
            f"like {folder / splits[0]}"
        )
    with refusing(TextError, f"{folder} cannot be read as a saved dataset"):
        import datasets

        data = datasets.load_from_disk(str(folder / splits[0] if splits else folder))
        yield from rows_of(data)


def saved_splits(folder: Path) -> list[str]:
    """The splits that a saved DatasetDict names; [] of a Dataset.

    Raises:
        TextError: Its list of them cannot be read.
    """
    file = folder / "dataset_dict.json"
    if not file.is_file():
        return []
    try:
        return [str(split) for split in json.loads(file.read_text("utf-8"))["splits"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TextError(f"{folder}: {file.name} lists no splits; save it again") from error


def rows_of(data: Any) -> Iterator[Row]:
    """The rows of a `datasets.Dataset`."""
    # As Arrow: features like images are not decoded.
    yield from _numbered(data.with_format("arrow").iter(_ROWS_AT_ONCE))


def _numbered(batches: Any) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for record in batch.to_pylist():
            number += 1
            yield f"row {number}", {name: _without_gaps(value) for name, value in record.items()}


def _without_gaps(value: Any) -> Any:
    """Arrow gives all structs of a column the same fields; those that were not there are None."""
    if isinstance(value, list):
        return [_without_gaps(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        name: _without_gaps(item)
        for name, item in value.items()
        if item is not None or name == "content"  # that templates expect of every message
    }
