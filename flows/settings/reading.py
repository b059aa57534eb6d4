"""Settings in YAML files: read without harm whatever the file holds, written so that they read.

What pydantic finds wrong with them, or with flags, is said in one line.
"""

import re
import reprlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from compress_core.errors import ConfigError
from compress_core.options import nearest
from compress_core.secrets import hide_all

MOST_BYTES = 1 << 20  # a file of settings has a few hundred


class _Loader(yaml.SafeLoader):
    """Refuses what a file of settings never needs and what does harm: a key that is there twice.

    An alias of a list or a mapping too: a few lines of them are gigabytes.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        alias = self.check_event(yaml.AliasEvent) and self.peek_event()
        node: yaml.Node | None = super().compose_node(parent, index)
        if alias and not isinstance(node, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(
                None, None, "found an alias of more than one value: write it out", alias.start_mark
            )
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and keys.count(key.value) > 1:
                raise yaml.MarkedYAMLError(None, None, f"found {key.value!r} twice", key.start_mark)
        return super().construct_mapping(node, deep)


def file_and_flags(given: dict[str, Any], file: Path | None) -> dict[str, Any]:
    """The settings of a YAML file with the flags on top; options of the method one by one.

    Raises:
        ConfigError: As :func:`read_yaml`.
    """
    values = read_yaml(file) if file else {}
    if isinstance(values.get("options"), dict) and "options" in given:
        given = given | {"options": values["options"] | given["options"]}
    return values | given


def read_yaml(file: Path, flag: str = "--config") -> dict[str, Any]:
    """The mapping in a YAML file.

    Args:
        file: The file.
        flag: What names it, for the message.

    Raises:
        ConfigError: There is no such file or it does not hold a mapping of words to values.
    """
    try:
        with file.open("rb") as opened:
            content = opened.read(MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {flag} {file}: {error.strerror}") from None
    if len(content) > MOST_BYTES:
        raise ConfigError(f"{flag} {file} has over {MOST_BYTES:,} bytes, too many for settings")
    try:
        values = yaml.load(content.decode(), _Loader)
    except RecursionError:
        raise ConfigError(f"{flag} {file} is not YAML for settings: nested too deep") from None
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:
        # Beside its own errors the parser lets through those of int(), float() and dates.
        line = " ".join(str(error).replace('in "<unicode string>", ', "").split())
        raise ConfigError(f"{flag} {file} is not YAML: {line}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{flag} {file} must hold a mapping of settings to values")
    odd = next((key for key in values if not isinstance(key, str)), None)
    if odd is not None or None in values:
        raise ConfigError(f"{flag} {file}: {odd!r} is no name of a setting; names are words")
    return values


def write_yaml(config: BaseModel, file: Path) -> None:
    """Saves the resolved configuration, but for secrets, so that ``--config`` reads it back."""
    file.write_text(
        yaml.safe_dump(
            hide_all(config.model_dump(mode="json")), sort_keys=False, allow_unicode=True
        ),
        encoding="utf-8",
    )


def one_line(
    known: Collection[str], others: Mapping[str, str], error: ValidationError, file: Path | None
) -> str:
    """What is wrong with settings.

    Args:
        known: Names of the settings that there are.
        others: Names of the settings of either kind of command, and of which kind they are.
        error: What pydantic found.
        file: The YAML file that some of the settings are from.
    """
    parts = [_problem(known, others, dict(problem)) for problem in error.errors()]
    return "; ".join(parts) + (f" (with --config {file})" if file else "")


def _problem(known: Collection[str], others: Mapping[str, str], problem: dict[str, Any]) -> str:
    name = ".".join(str(part) for part in problem["loc"]) or "configuration"
    kind, given = problem["type"], problem["input"]
    if kind == "missing":
        return f"{name} is missing (--{name.replace('_', '-')} or `{name}:` in --config)"
    if kind == "extra_forbidden" and name in others:
        return f"{name!r} is a setting of {others[name]}, which this is not"
    if kind == "extra_forbidden":
        return f"there is no setting called {name!r}{nearest(name, known)}"
    if kind == "value_error":  # ours, a whole sentence
        return str(problem["ctx"]["error"])
    choices = re.findall("'(.*?)'", problem["ctx"]["expected"]) if kind == "literal_error" else []
    return (
        f"{name}: {problem['msg'].lower()}, got {reprlib.repr(given)}{nearest(str(given), choices)}"
    )
