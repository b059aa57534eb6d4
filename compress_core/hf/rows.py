"""Files of texts, row by row: plain text, JSON, tables and Arrow, compressed or not.

Nothing is copied into a cache and nothing leaves the machine.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from compress_core.errors import TextError
from compress_core.hf.arrow_rows import arrow_rows, parquet_rows
from compress_core.hf.refusing import first_line
from compress_core.hf.row import Record, Row, Unreadable, kind_of, reading

_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


def _zstandard(path: Path) -> BinaryIO:
    import pyarrow as pa

    return cast(BinaryIO, pa.input_stream(str(path), compression="zstd"))


_OPENERS: dict[str, Callable[[Path], Any]] = {
    "": lambda path: path.open("rb"),
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _zstandard,
}


def format_of(path: Path) -> str:
    """What decides how a file is read: the suffix, with that of its compression: ".jsonl.gz".

    Raises:
        TextError: No reader knows it.
    """
    name, packed = path.name.lower(), path.suffix.lower()
    if packed in _OPENERS:
        name = name.removesuffix(packed)
    else:
        packed = ""
    suffix = Path(name).suffix
    if suffix not in READERS or (packed and suffix in _ALONE):
        raise TextError(f"{path}: cannot read a {suffix + packed or 'nameless'} file; give {KNOWN}")
    return suffix + packed


def is_plain(path: Path) -> bool:
    """Whether a file is one text, without fields.

    Raises:
        TextError: As :func:`format_of`.
    """
    return READERS[_first_suffix(format_of(path))] is _plain


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file, in their order; of plain text one, with the field ``text``.

    Raises:
        TextError: The file is missing, damaged, or of no kind that is read.
    """
    kind = format_of(path)
    if not path.is_file():
        what = "is no regular file; give one" if path.exists() else "does not exist; check the path"
        raise TextError(f"{path} {what}")
    suffix = _first_suffix(kind)
    yield from READERS[suffix](path, kind.removeprefix(suffix))


def _first_suffix(kind: str) -> str:
    return "." + kind.split(".")[1]


def _content(path: Path, packed: str) -> bytes:
    with reading(path, f" as {packed}" if packed else ""), _OPENERS[packed](path) as file:
        content = bytes(file.read())
    for mark, name in _MARKS.items():
        if content.startswith(mark):
            raise TextError(f"{path} is {name}, not UTF-8; convert it first")
    return content.removeprefix(b"\xef\xbb\xbf")


def _text(path: Path, packed: str) -> str:
    content = _content(path, packed)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 at byte {error.start}; convert it first") from error


def _plain(path: Path, packed: str) -> Iterator[Row]:
    text = _text(path, packed)
    if "\0" in text:
        raise TextError(
            f"{path} holds a NUL at character {text.index(chr(0))}: it is binary, or UTF-16 "
            "without its mark; give UTF-8 text"
        )
    yield "", {"text": text.replace("\r\n", "\n").replace("\r", "\n")}


def _json_lines(path: Path, packed: str) -> Iterator[Row]:
    # Split at "\n" alone: a JSON string may hold the other line ends that splitlines() knows.
    for number, line in enumerate(_content(path, packed).split(b"\n"), start=1):
        if line.strip():
            yield f"line {number}", _parsed(line)


def _parsed(line: bytes) -> Record | Unreadable:
    try:
        return _record(json.loads(line.decode()))
    except UnicodeDecodeError as error:
        return Unreadable(f"is not UTF-8 at its byte {error.start}")
    except json.JSONDecodeError as error:
        return Unreadable(f"is not JSON: {error.msg}")
    except (ValueError, RecursionError) as error:  # numbers too long, lists too deep
        return Unreadable(f"is not JSON that can be read: {first_line(error)}")


def _record(value: Any) -> Record | Unreadable:
    if isinstance(value, dict):
        return value
    return Unreadable(f"is {kind_of(value)}; expected an object with fields")


def _json(path: Path, packed: str) -> Iterator[Row]:
    """A list of records, an object that holds one, or, as many are, JSON lines after all."""
    text = _text(path, packed)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        first = text.lstrip().split("\n", 1)[0]
        if first.startswith("{") and isinstance(_parsed(first.encode()), dict):
            yield from _json_lines(path, packed)
            return
        raise TextError(
            f"{path} is not JSON at line {error.lineno}: {error.msg}; is it cut short?"
        ) from error
    except (ValueError, RecursionError) as error:
        raise TextError(f"{path} is not JSON that can be read: {first_line(error)}") from error
    for number, item in enumerate(_listed(path, value), start=1):
        yield f"record {number}", _record(item)


def _listed(path: Path, value: Any) -> list[Any]:
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        raise TextError(f"{path} holds {kind_of(value)}; expected a list of records")
    if "text" in value or "messages" in value:
        return [value]
    lists = [
        name
        for name, item in value.items()
        if isinstance(item, list) and item and all(isinstance(record, dict) for record in item)
    ]
    if isinstance(value.get("data"), list):
        lists = ["data"]
    if len(lists) > 1:
        raise TextError(
            f"{path} holds several lists of records ({', '.join(lists)}); "
            "put the one that is meant in a file of its own"
        )
    return cast(list[Any], value[lists[0]]) if lists else [value]


def _table(delimiter: str) -> Callable[[Path, str], Iterator[Row]]:
    def read(path: Path, packed: str) -> Iterator[Row]:
        csv.field_size_limit(2**31 - 1)  # a document is longer than what csv takes for one
        lines = io.StringIO(_text(path, packed), newline="")
        with reading(path, " as a table"):
            rows = csv.reader(lines, delimiter=delimiter, strict=True)
            names = next(rows, [])
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise TextError(f"{path} has two columns called {twice!r}; rename one")
            for row in rows:
                if row:
                    yield f"line {rows.line_num}", _cells(names, row)

    return read


def _cells(names: list[str], row: list[str]) -> Record | Unreadable:
    if len(row) != len(names):
        return Unreadable(f"has {len(row)} cells for {len(names)} columns")
    return dict(zip(names, row, strict=True))


_ALONE = {".parquet": parquet_rows, ".arrow": arrow_rows}  # have a compression of their own
READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".txt": _plain,
    ".md": _plain,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _table(","),
    ".tsv": _table("\t"),
    **_ALONE,
}
KNOWN = (
    f"{', '.join(kind for kind in READERS if kind not in _ALONE)} (also with "
    f"{', '.join(filter(None, _OPENERS))}) or {' or '.join(_ALONE)}"
)
