"""The command line that asks for the same again, from resolved settings."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flows.settings.config import RunConfig, Settings, SweepConfig
from flows.settings.home import default_home

NOT_AGAIN = ("refresh",)  # what was computed again then need not be now


def run_command(config: Mapping[str, Any]) -> str:
    """``eigenpress run`` with the flags that make these settings.

    Args:
        config: A run's, as its record has it.
    """
    return " ".join(run_words(config))


def run_words(config: Mapping[str, Any]) -> list[str]:
    """The same in pieces: the command, then each flag with its values.

    Args:
        config: As of :func:`run_command`; what it lacks is left out.
    """
    return _words("run", RunConfig, config)


def sweep_command(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The one ``eigenpress sweep`` that makes these runs; where none does, a command for each.

    Args:
        configs: Of the sweep's runs.
    """
    methods = list(dict.fromkeys(config["method"] for config in configs))
    kept = list(dict.fromkeys(config["kept"] for config in configs))
    common = [{k: v for k, v in c.items() if k not in ("method", "kept")} for c in configs]
    whole = [(m, k) for m in methods for k in kept]
    if [(c["method"], c["kept"]) for c in configs] != whole or any(c != common[0] for c in common):
        return [run_command(config) for config in configs]
    settings = {"model": common[0]["model"], "methods": methods, "kept": kept, **common[0]}
    return [" ".join(_words("sweep", SweepConfig, settings))]


def report_command(name: str, home: Path) -> str:
    """``eigenpress report`` of what has that name in a data directory."""
    elsewhere = home.expanduser() != default_home()
    return shlex.join(["eigenpress", "report", name, *(["--home", str(home)] if elsewhere else [])])


def _words(word: str, kind: type[Settings], config: Mapping[str, Any]) -> list[str]:
    words = [f"eigenpress {word}"]
    own = [name for name in ("model", "method", "methods", "kept") if name in kind.model_fields]
    for name in [*own, *(name for name in kind.model_fields if name not in own)]:
        if name in config and name not in NOT_AGAIN:
            default = kind.model_fields[name].get_default(call_default_factory=True)
            if name in own or config[name] != _plain(default):
                words.append(shlex.join(_flag(name, config[name])))
    return words


def _plain(default: Any) -> Any:
    """A default as a record has it: JSON knows no paths."""
    return str(default) if hasattr(default, "__fspath__") else default


def _flag(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else "--no-" + flag[2:]]
    if isinstance(value, dict):
        return [word for key, own in value.items() for word in ("--option", f"{key}={_text(own)}")]
    if isinstance(value, list):
        return [flag, ",".join(map(_text, value))]
    return [flag, _text(value)]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
