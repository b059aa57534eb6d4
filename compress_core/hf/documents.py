"""From a text source to documents: files and folders of texts, chats, datasets of the hub.

Rows that are no documents are counted, and left out where that was asked for.
"""

import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress_core.errors import TextError
from compress_core.hf.arrow_rows import read_saved, rows_of
from compress_core.hf.chats import BadRow, ChatRenderer, as_chat
from compress_core.hf.refusing import refusing
from compress_core.hf.row import Record, Row, Unreadable, kind_of
from compress_core.hf.rows import KNOWN, READERS, format_of, is_plain, read_rows

_SAVED = ("dataset_dict.json", "dataset_info.json", "state.json")
_BESIDE = (".json", ".md")  # what also describes a folder of shards
_NAMED = 3  # bad rows that a refusal names


@dataclass(frozen=True)
class Documents:
    """What a source holds.

    Attributes:
        texts: The documents, in their order.
        places: Where each stands in the source ("line 3"); "" of a plain text.
        notes: What people should be told: rows left out, what a chat template does not read.
    """

    texts: list[str]
    places: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_documents(
    source: str,
    field: str | None = None,
    *,
    split: str = "train",
    tokenizer: Any = None,
    skip_bad_rows: float = 0,
    field_setting: str = "field",
) -> Documents:
    """The documents of a text source, in their order.

    Args:
        source: A file (a `.txt` or `.md` is one document, of others every row is one), a folder of
            files of one kind, one that `datasets.save_to_disk` made, or a HuggingFace dataset as
            `id`, `id:config` or `id:config:split`.
        field: Field of the records; `text` unless given, or `messages` where there is no `text`.
            A plain text has none.
        split: Split of a HuggingFace dataset whose id names none.
        tokenizer: Renders chat records (lists of messages) by its chat template.
        skip_bad_rows: How many rows that are no documents are left out: below 1 a share of all
            rows, else a count.
        field_setting: What a user sets `field` with, for messages.

    Raises:
        TextError: The source is missing, empty, unreadable or has not that field, or more rows
            than allowed are no documents; the message begins with the source.
    """
    renderer = ChatRenderer(tokenizer)
    found = Documents([])
    rows = bad = 0
    examples: list[str] = []
    lacking: Record | None = None  # the first record without the field, while no other has it
    plain = local_path(source).is_file() and not has_fields(source)
    for place, row in _rows(source, split):
        rows += 1
        try:
            if isinstance(row, Unreadable):
                raise BadRow(row.reason)
            found.texts.append(_document(row, None if plain else field, renderer))
            found.places.append(place)
        except _NoField as error:
            bad += 1
            lacking = lacking or error.record
            examples.append(f"{place} {error}")
        except BadRow as error:
            bad += 1
            examples.append(f"{place} {error}")
        except TextError as error:  # nothing that leaving a row out would mend
            raise TextError(f"{source} {place}: {error}") from error
        del examples[_NAMED:]
    if lacking is not None and not found.texts:
        raise TextError(_no_field(source, field, lacking, field_setting))
    _check_bad(source, bad, rows, skip_bad_rows, examples)
    if not any(document.strip() for document in found.texts):
        raise TextError(f"{source} holds no text; give a source with some")
    if bad:
        found.notes.append(
            f"{bad} of {rows} rows of {source} are left out: {'; '.join(examples)}"
            + (" ..." if bad > len(examples) else "")
        )
    found.notes.extend(f"{source}: {note}" for note in renderer.notes())
    return found


def _check_bad(source: str, bad: int, rows: int, allowed: float, examples: list[str]) -> None:
    """Refuses a source with more bad rows than allowed."""
    most = math.floor(allowed * rows) if allowed < 1 else allowed
    if bad <= most:
        return
    said = "; ".join(examples) + ("; ..." if bad > len(examples) else "")
    if bad == rows:
        raise TextError(f"{source}: none of its rows ({rows}) is a document: {examples[0]}")
    advice = f"mend them, or leave them out with --skip-bad-rows {bad}"
    if allowed:
        advice += f" (--skip-bad-rows {allowed:g} allows {most:g})"
    what = "is no document" if bad == 1 else "are no documents"
    raise TextError(f"{source}: {bad} of {rows} rows {what}: {said}; {advice}")


class _NoField(BadRow):
    def __init__(self, field: str, record: Record) -> None:
        super().__init__(f"has no field {field!r}")
        self.record = record


def _document(record: Record, field: str | None, renderer: ChatRenderer) -> str:
    if field is None:
        field = "messages" if "text" not in record and "messages" in record else "text"
    if field not in record:
        raise _NoField(field, record)
    value = record[field]
    chat = as_chat(value, json_too=field != "text")
    if chat is not None:
        return renderer.render(field, chat, record)
    if isinstance(value, list):
        raise BadRow(f"has a list as {field!r}, but not of messages with a role")
    if not isinstance(value, str):
        raise BadRow(f"has {kind_of(value)} as {field!r}; expected a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"has half a character (a lone surrogate) in {field!r}") from error
    return value


def _no_field(source: str, field: str | None, record: Record, setting: str) -> str:
    names = [str(name) for name in record]
    wanted = field or "text"
    lowered = {name.lower(): name for name in names}
    near = [lowered[n] for n in difflib.get_close_matches(wanted.lower(), lowered, n=1)]
    strings = [name for name in names if isinstance(record[name], str) or as_chat(record[name])]
    near = near or (strings if len(strings) == 1 else [])
    hint = f" (perhaps {near[0]!r})" if near else ""
    there = ", ".join(names) or "none"
    return (
        f"{source}: no row has a field {wanted!r}; the fields there are: {there}; "
        f"say which holds the text with {setting}{hint}"
    )


def has_fields(source: str) -> bool:
    """Whether a text source holds records; a plain text, known by its suffix, is one document."""
    try:
        return not is_plain(local_path(source))
    except TextError:  # no file of a known kind: a folder or a dataset
        return True


def local_path(source: str) -> Path:
    """Where a source would be, were it a local one.

    Raises:
        TextError: The file system does not let it be looked at.
    """
    try:
        path = Path(source).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).rstrip(".")
        raise TextError(f"{source} cannot be read: {reason}; check the path") from error
    return path


def source_files(source: str) -> list[Path]:
    """The local files that a source is read from, in their order; none of a dataset of the hub.

    Raises:
        TextError: It is a folder without texts, or with several kinds of them.
    """
    path = local_path(source)
    if path.is_file():
        return [path]
    if not path.is_dir():
        return []
    if any((path / name).is_file() for name in _SAVED):
        return sorted(file for file in path.rglob("*") if file.is_file())
    return _shards(source, path)


def source_format(source: str) -> str:
    """What decides how a source is read beside its bytes: suffixes of files, or "dataset"."""
    path = local_path(source)
    if path.is_dir():
        return "saved" if any((path / n).is_file() for n in _SAVED) else "folder"
    return format_of(path) if path.is_file() else "dataset"


def _rows(source: str, split: str) -> Iterator[Row]:
    path = local_path(source)
    if path.is_dir():
        if any((path / name).is_file() for name in _SAVED):
            return read_saved(path)
        return _of_shards(_shards(source, path))
    if path.exists():
        return read_rows(path)
    known = any(suffix in READERS for suffix in path.suffixes[-2:])
    if known or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise TextError(f"{source} does not exist; check the path")
    return _read_hub(source, split)


def _shards(source: str, folder: Path) -> list[Path]:
    """The files of a folder that hold rows, all of one kind and of one split."""
    kinds: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        try:
            if file.is_file():
                kinds.setdefault(format_of(file), []).append(file)
        except TextError:
            continue
    if len(kinds) > 1:
        kinds = {kind: files for kind, files in kinds.items() if kind not in _BESIDE}
    if not kinds:
        raise TextError(f"{source} is a folder without texts; give {KNOWN}")
    if len(kinds) > 1:
        raise TextError(
            f"{source} is a folder with texts of several kinds ({', '.join(kinds)}): give one file"
        )
    (files,) = kinds.values()
    splits = {_split_of(file) for file in files} - {""}
    if len(splits) > 1:
        raise TextError(
            f"{source} is a folder with the splits {', '.join(sorted(splits))}: give a file, or a "
            "folder with one of them"
        )
    return files


def _split_of(file: Path) -> str:
    """The split that a file's name begins with, as hub datasets name theirs."""
    first = file.name.lower().replace("_", "-").replace(".", "-").split("-")[0]
    words = {"dev": "validation", "val": "validation", "valid": "validation", "eval": "test"}
    return words.get(first, first if first in ("train", "test", "validation") else "")


def _of_shards(files: Sequence[Path]) -> Iterator[Row]:
    for file in files:
        for place, row in read_rows(file):
            yield f"{file.name} {place}".rstrip(), row


def _read_hub(source: str, split: str) -> Iterator[Row]:
    import datasets

    name, *rest = source.split(":")
    if len(rest) > 2:
        raise TextError(f"{source}: got {len(rest) + 1} parts; give id:config:split")
    config = rest[0] or None if rest else None
    wanted = rest[1] if len(rest) == 2 else split
    with refusing(
        TextError,
        f"{source} (split {wanted}) cannot be loaded as a dataset",
        "check the id and the network, or give a local file",
    ):
        data = datasets.load_dataset(name, config, split=wanted)
    yield from rows_of(data)
