"""Command-line flags made from the fields of a configuration, so that each is defined once."""

import inspect
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import ByteSize
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from compress_core.errors import ConfigError
from flows.settings.config import Settings

FIRST = (
    "model",
    "method",
    "methods",
    "kept",
    "target_bytes",
    "target_perplexity",
    "allocate",
)  # what a command can't do without, shown first


def with_flags(*kinds: type[Settings]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command a flag for every field of ``kinds``; it receives those the user set.

    The decorated function is called as ``command(given, **own)`` with its own remaining parameters.
    """
    fields: dict[str, FieldInfo] = {}
    for kind in kinds:
        fields |= {name: field for name, field in kind.model_fields.items() if name not in fields}
    order = sorted(fields, key=lambda n: FIRST.index(n) if n in FIRST else len(FIRST))
    fields = {name: fields[name] for name in order}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command).parameters.values())[1:]

        def wrapper(**values: Any) -> None:
            given = {}
            for name, field in fields.items():
                value = values.pop(name)
                if value is not None and value != []:
                    given[name] = _value(field, value)
            command(given, **values)

        made = [_parameter(name, field) for name, field in fields.items()]
        wrapper.__signature__ = inspect.Signature([*made, *own])  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in [*made, *own]}
        wrapper.__doc__ = command.__doc__
        wrapper.__name__ = command.__name__
        return wrapper

    return decorate


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    kind = _plain_type(field.annotation)
    flag = "--option" if name == "options" else "--" + name.replace("_", "-")
    flags = [f"{flag}/--no-{name.replace('_', '-')}"] if kind is bool else [flag]
    help_text = (field.description or "") + _note(field)
    many = kind in (list, dict)
    parsed: Any = list[str] if many else kind | None
    annotation = Annotated[
        parsed,
        typer.Option(*flags, help=help_text, show_default=False, metavar=_metavar(name, kind)),
    ]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=[] if many else None, annotation=annotation
    )


def _plain_type(annotation: Any) -> Any:
    """The type that typer parses: a Literal is text, a list or dict is given item by item."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        inner = [part for part in get_args(annotation) if part is not type(None)]
        return _plain_type(inner[0])
    if origin is Literal:
        return str
    if origin in (list, dict):
        return origin
    return str if annotation is ByteSize else annotation


def _metavar(name: str, kind: Any) -> str | None:
    if kind is bool:
        return None
    words = {"options": "NAME=VALUE", "kept": "SHARE", "home": "DIR", "task_path": "DIR"}
    words |= {"batch_size": "N", "output": "DIR", "report": "DIR", "target_bytes": "SIZE"}
    return words.get(name) or {int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT")


def _note(field: FieldInfo) -> str:
    """What may be given, how often, and what is taken when nothing is."""
    often = {list: "a,b,... or repeated", dict: "repeated for more"}
    parts = [" or ".join(_choices(field.annotation)), often.get(_plain_type(field.annotation), "")]
    if field.default not in (None, PydanticUndefined, False):
        parts.append(f"default: {field.default}")
    text = "; ".join(part for part in parts if part)
    return f" ({text})" if text else ""


def _choices(annotation: Any) -> list[str]:
    """The words that a Literal, or a list of them, allows."""
    if get_origin(annotation) is Literal:
        return [str(word) for word in get_args(annotation)]
    return [word for part in get_args(annotation) for word in _choices(part)]


def _value(field: FieldInfo, value: Any) -> Any:
    """Splits ``a,b`` into items and ``name=value`` into pairs."""
    kind = _plain_type(field.annotation)
    if kind is list:
        return [item.strip() for part in value for item in part.split(",") if item.strip()]
    if kind is dict:
        pairs = {}
        for item in value:
            name, sign, text = item.partition("=")
            if not sign or not name:
                raise ConfigError(f"--option takes NAME=VALUE, got {item!r}")
            pairs[name] = text
        return pairs
    return value
