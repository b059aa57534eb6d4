"""From a text source to documents: plain text, JSON lines, parquet, chats, datasets of the hub.

Chats go through the tokenizer's template; whatever is wrong is one clear line.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compress_core.errors import TextError

_FILE_SUFFIXES = frozenset(
    {".csv", ".json", ".tsv", ".md", ".gz", ".zst", ".zip", ".html", ".arrow"}
)

Record = tuple[str, dict[str, Any]]
"""Where a record stands (for messages) and its fields."""


def read_documents(
    source: str, field: str | None = None, *, split: str = "train", tokenizer: Any = None
) -> list[str]:
    """The documents of a text source, in their order.

    Args:
        source: A `.txt` file (one document), a `.jsonl` or `.parquet` file, or a HuggingFace
            dataset as `id`, `id:config` or `id:config:split`.
        field: Field of the records; `text` unless given, or `messages` where there is no `text`.
        split: Split of a HuggingFace dataset whose id names none.
        tokenizer: Renders chat records (lists of messages) by its chat template.

    Raises:
        TextError: The source is missing, empty, unreadable or has not that field.
    """
    path = Path(source).expanduser()
    if not has_fields(source):
        documents = [_read_plain(path)]
    else:
        records = _records(source, path, split)
        documents = [_document(where, record, field, tokenizer) for where, record in records]
    if not any(document.strip() for document in documents):
        raise TextError(f"{source} holds no text; give a source with some")
    return documents


def has_fields(source: str) -> bool:
    """Whether a text source holds records; a `.txt` file is one document."""
    return Path(source).expanduser().suffix.lower() != ".txt"


def _records(source: str, path: Path, split: str) -> Iterator[Record]:
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return _read_jsonl(path)
    if suffix == ".parquet":
        return _read_parquet(path)
    if path.is_dir():
        raise TextError(f"{source} is a folder, not a text; give one of the files in it")
    if path.exists() or suffix in _FILE_SUFFIXES:
        raise TextError(
            f"{source}: cannot read a {suffix or 'nameless'} file; give .txt, .jsonl or .parquet"
        )
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise TextError(f"{source} does not exist; check the path")
    return _read_hub(source, split)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise TextError(f"{path} does not exist; check the path")
    return path


def _read_plain(path: Path) -> str:
    try:
        return _existing(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 at byte {error.start}; convert it first") from error
    except OSError as error:
        raise TextError(f"{path} cannot be read: {error.strerror}") from error


def _read_jsonl(path: Path) -> Iterator[Record]:
    # Split at "\n" alone: a JSON string may hold the other line ends that splitlines() knows.
    for number, line in enumerate(_read_plain(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise TextError(f"{where} is not JSON: {error.msg}; one record per line") from error
        if not isinstance(record, dict):
            raise TextError(f"{where} is a {type(record).__name__}; expected an object with fields")
        yield where, record


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(_existing(path)) as file:
            number = 0
            for batch in file.iter_batches():
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", record
    except (pa.ArrowException, OSError) as error:
        raise TextError(f"{path} cannot be read as parquet: {_first_line(error)}") from error


def _read_hub(source: str, split: str) -> Iterator[Record]:
    import datasets

    name, *rest = source.split(":")
    if len(rest) > 2:
        raise TextError(f"dataset {source}: got {len(rest) + 1} parts; give id:config:split")
    config = rest[0] or None if rest else None
    wanted = rest[1] if len(rest) == 2 else split
    try:
        data = datasets.load_dataset(name, config, split=wanted)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise TextError(
            f"dataset {source} (split {wanted}) cannot be loaded: {_first_line(error)}; "
            "check the id and the network, or give a local file"
        ) from error
    for number, record in enumerate(data, start=1):
        yield f"{source} record {number}", record


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _document(where: str, record: dict[str, Any], field: str | None, tokenizer: Any) -> str:
    if field is None:
        field = "messages" if "text" not in record and "messages" in record else "text"
    if field not in record:
        there = ", ".join(map(str, record)) or "none"
        raise TextError(f"{where}: no field {field!r}; the fields there are: {there}")
    value = record[field]
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return _render_chat(where, field, value, tokenizer)
    raise TextError(f"{where}: field {field!r} is a {type(value).__name__}; expected a string")


def _render_chat(where: str, field: str, messages: list[Any], tokenizer: Any) -> str:
    from jinja2 import TemplateError

    if not messages or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise TextError(f"{where}: field {field!r} is a list, but not of messages with a role")
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise TextError(
            f"{where}: field {field!r} is a chat, and the tokenizer has no chat template; "
            "give plain text or a chat model"
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except TemplateError as error:
        raise TextError(f"{where}: the chat template refuses it: {_first_line(error)}") from error
