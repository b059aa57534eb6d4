"""What a row of a text source is, and how errors of reading one are said."""

import csv
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress_core.errors import TextError

Record = dict[str, Any]


@dataclass(frozen=True)
class Unreadable:
    """A row that is no record, and why."""

    reason: str


Row = tuple[str, Record | Unreadable]
"""Where a row stands in its file ("line 3"), and what it holds."""


@contextmanager
def reading(path: Path, what: str = "") -> Iterator[None]:
    """Errors of files and libraries as one line about the path."""
    import pyarrow as pa

    kinds = (OSError, EOFError, zlib.error, lzma.LZMAError, csv.Error, pa.ArrowException)
    try:
        yield
    except kinds as error:
        said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        line = said.strip().splitlines()[0].rstrip(".") if said.strip() else type(error).__name__
        raise TextError(f"{path} cannot be read{what}: {line}") from error


def kind_of(value: Any) -> str:
    """What a value is, in JSON's words: "null", "a number", "an object"."""
    if value is None:
        return "null"
    for kinds, name in _NAMES:
        if isinstance(value, kinds):
            return name
    return f"a {type(value).__name__}"


_NAMES: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (bool, "true or false"),
    ((int, float), "a number"),
    (str, "a string"),
    (list, "a list"),
    (dict, "an object"),
)
