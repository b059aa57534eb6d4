"""Chat records through a tokenizer's chat template, with all that the record gives the template."""

import inspect
import json
import re
from collections import Counter
from typing import Any

from compress_core.errors import TextError
from compress_core.hf.refusing import first_line, refusing
from compress_core.hf.row import kind_of

_LISTS = ("tools", "documents")  # parameters of apply_chat_template that records bring
_OPTIONS = "chat_template_kwargs"  # a record's own further variables, as trl names them


class BadRow(Exception):
    """A row that is no document; says why, to be read behind the row's place."""


def as_chat(value: Any, json_too: bool = True) -> list[dict[str, Any]] | None:
    """The messages that a field holds, or None where it holds no chat.

    Args:
        value: A list of messages with a role, or that as a JSON string.
        json_too: Whether a string may be one.
    """
    if json_too and isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    chat = isinstance(value, list) and value
    return value if chat and all(isinstance(m, dict) and "role" in m for m in value) else None


class ChatRenderer:
    """Renders the chats of one source.

    Args:
        tokenizer: A transformers tokenizer, or None.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._unread: Counter[str] = Counter()
        template = getattr(tokenizer, "chat_template", None)
        self._words = set(re.findall(r"\w+", str(template or "")))
        self._taken = {"messages"}  # what is no variable that a record may set
        if template:
            self._taken |= set(inspect.signature(tokenizer.apply_chat_template).parameters)
            self._taken |= set(tokenizer.special_tokens_map)

    def render(self, field: str, chat: list[dict[str, Any]], record: dict[str, Any]) -> str:
        """One record as text: its messages, with its tools, documents and further variables.

        Raises:
            TextError: The tokenizer has no chat template.
            BadRow: The record is not what the template takes.
        """
        if not self._words:
            raise TextError(
                f"field {field!r} is a chat, and the tokenizer has no chat template; "
                "give plain text or a chat model"
            )
        given = {name: _listed(name, record[name]) for name in _LISTS if record.get(name)}
        given = {name: items for name, items in given.items() if items}  # none, to a template
        self._unread.update(name for name in given if name not in self._words)
        variables = self._variables(field, record)
        try:
            with refusing(TextError, "the chat template refuses it"):
                text = self._tokenizer.apply_chat_template(
                    chat, tokenize=False, **given, **variables
                )
        except TextError as error:
            raise BadRow(f"has a chat, but {error}") from error
        return str(text)

    def _variables(self, field: str, record: dict[str, Any]) -> dict[str, Any]:
        """Further fields that the template reads by their name."""
        options = record.get(_OPTIONS) or {}
        if isinstance(options, str):
            options = _parsed(_OPTIONS, options)
        if not isinstance(options, dict):
            raise BadRow(f"has {kind_of(options)} as {_OPTIONS!r}; expected an object")
        return {
            name: value
            for name, value in {**record, **options}.items()
            if name in self._words and name not in {*self._taken, field} and value is not None
        }

    def notes(self) -> list[str]:
        """What records brought and the template does not read."""
        return [
            f"{count} chats have {name}, which the chat template does not read"
            for name, count in self._unread.items()
        ]


def _listed(name: str, value: Any) -> list[Any]:
    """Tools or documents as a list of objects; some datasets hold them as JSON strings."""
    if isinstance(value, str):
        value = _parsed(name, value)
    items = [value] if isinstance(value, dict) else value
    if not isinstance(items, list):
        raise BadRow(f"has {kind_of(items)} as {name!r}; expected a list")
    return [_parsed(name, item) if isinstance(item, str) else item for item in items]


def _parsed(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"has {name!r} that are not JSON: {first_line(error)}") from error
