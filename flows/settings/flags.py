"""Command-line flags made from the fields of a configuration, so that each is defined once."""

import importlib.util
import inspect
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import ByteSize
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from compress_core.errors import ConfigError
from flows.settings.belonging import METHOD_WORD, REQUIRED, belonging
from flows.settings.config import Settings

ROOM = 48  # columns that choices may take beside their flag


def with_flags(*kinds: type[Settings]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command a flag for every field of ``kinds``; it receives those the user set.

    The decorated function is called as ``command(given, **own)`` with its own remaining parameters.
    """
    fields: dict[str, FieldInfo] = {}
    for kind in kinds:
        fields |= {name: field for name, field in kind.model_fields.items() if name not in fields}
    own_first = sorted(fields, key=lambda name: name in Settings.model_fields)
    fields = {name: fields[name] for name in own_first}
    required = {
        name
        for name in fields
        if all(name in k.model_fields and k.model_fields[name].is_required() for k in kinds)
    }

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command).parameters.values())[1:]

        def wrapper(**values: Any) -> None:
            given = {}
            for name, field in fields.items():
                value = values.pop(name)
                if value is not None and value != []:
                    given[name] = _value(field, value)
            command(given, **values)

        made = [_parameter(name, field, name in required) for name, field in fields.items()]
        wrapper.__signature__ = inspect.Signature([*made, *own])  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in [*made, *own]}
        wrapper.__doc__ = command.__doc__
        wrapper.__name__ = command.__name__
        return wrapper

    return decorate


def _parameter(name: str, field: FieldInfo, required: bool) -> inspect.Parameter:
    kind = _plain_type(field.annotation)
    flag = "--option" if name == "options" else "--" + name.replace("_", "-")
    flags = [f"{flag}/--no-{name.replace('_', '-')}"] if kind is bool else [flag]
    many = kind in (list, dict)
    # A path is checked as the word it was given as: Path("") is the folder where one stands.
    parsed: Any = list[str] if many else (str if kind is Path else kind) | None
    word, choices = _word(field, kind), _choices(field.annotation)
    option = typer.Option(
        *flags,
        help=(field.description or "") + _note(field, word),
        show_default=False,
        metavar=word or None,
        rich_help_panel=REQUIRED if required else belonging(field).group,
        autocompletion=_completion(belonging(field).word, choices),
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=[] if many else None,
        annotation=Annotated[parsed, option],
    )


def _completion(word: str, choices: list[str]) -> Callable[[str], list[str]] | None:
    """What the shell offers for a value; None leaves it the names of files."""
    if word == METHOD_WORD:
        return offering(method_names)
    return offering(lambda: choices) if choices else None


def offering(words: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """What a shell is offered: those words that begin as the one that is being typed."""

    def offered(incomplete: str) -> list[str]:
        return [word for word in words() if word.startswith(incomplete)]

    return offered


def method_names() -> list[str]:
    """Names of the methods, each the name of its file: reading their code takes seconds."""
    package = importlib.util.find_spec("compress_core.methods")
    folders = package.submodule_search_locations if package else None
    return sorted(file.stem for place in folders or [] for file in Path(place).glob("[a-z]*.py"))


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


def _word(field: FieldInfo, kind: Any) -> str:
    """What stands for the value in help: the choices where there is room, or a word."""
    if kind is bool:
        return ""
    choices = "|".join(_choices(field.annotation))
    if choices and len(choices) <= ROOM and not belonging(field).word:
        return choices
    return belonging(field).word or {int: "N", float: "X"}.get(kind, "TEXT")


def _note(field: FieldInfo, word: str) -> str:
    """What may be given, where the word does not say it, how often, and what is taken else."""
    often = {list: "a,b,... or repeated", dict: "repeated for more"}
    choices = _choices(field.annotation)
    parts = [
        "" if word == "|".join(choices) else ", ".join(c for c in choices if c not in word),
        often.get(_plain_type(field.annotation), ""),
    ]
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
        parts = [[item.strip() for item in part.split(",") if item.strip()] for part in value]
        return [item for items in parts for item in items or [""]]  # an empty part is refused
    if kind is dict:
        pairs = {}
        for item in value:
            name, sign, text = item.partition("=")
            if not sign or not name:
                raise ConfigError(f"--option takes NAME=VALUE, got {item!r}")
            if name in pairs:
                raise ConfigError(f"--option {name} is there twice; give it once")
            pairs[name] = text
        return pairs
    return value
