"""Options of methods and allocators, as text from a command line or values from a YAML file."""

import difflib
from collections.abc import Iterable
from typing import Any

from compress_core.errors import ConfigError

OptionValue = str | int | float | bool
MOST = 10**9
"""Size of any number: nothing that is counted or weighed is beyond it."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a sentence on a word that is not known: ". Did you mean 'x'?", or nothing."""
    plain = {name.lower().replace("-", "_"): name for name in reversed(list(known))}
    near = difflib.get_close_matches(word.lower().replace("-", "_"), plain, n=1)
    return f". Did you mean {plain[near[0]]!r}?" if near else ""


def read_option(owner: str, option: str, given: OptionValue, default: Any) -> Any:
    """``given`` as the type of the option's default; an option without one is a number.

    Args:
        owner: Whose option it is, for the message ("method 'asvd'").
        option: Its name.
        given: What the user gave.
        default: The option's default.

    Raises:
        ConfigError: It cannot be read as that, or is no finite number.
    """
    value = _read(owner, option, given, default)
    if isinstance(value, int | float) and not abs(value) <= MOST:  # nan is not
        raise ConfigError(f"option {option!r} of {owner}: {given!r} is no number to compute with")
    return value


def _read(owner: str, option: str, given: OptionValue, default: Any) -> Any:
    wanted = float if default is None else type(default)
    if wanted is bool and isinstance(given, str) and given.lower() in ("true", "false"):
        return given.lower() == "true"
    if isinstance(given, wanted) and (wanted is bool or not isinstance(given, bool)):
        return given
    cut = isinstance(given, float) and wanted is int  # int() cuts without a word
    try:
        if wanted is bool or isinstance(given, bool) or cut:
            raise ValueError(given)
        return wanted(given)
    except ValueError:
        kind = f"{'an' if wanted is int else 'a'} {wanted.__name__}"
        raise ConfigError(f"option {option!r} of {owner} must be {kind}, got {given!r}") from None


def one_of(owner: str, option: str, given: str, choices: tuple[str, ...]) -> str:
    """``given`` if it is one of the words that an option allows.

    Raises:
        ConfigError: It is not.
    """
    if given not in choices:
        raise ConfigError(
            f"option {option!r} of {owner} must be one of {', '.join(choices)}; got {given!r}"
            f"{nearest(str(given), choices)}"
        )
    return given
