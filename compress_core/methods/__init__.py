"""The table of methods, and the one way to build one from a name and options."""

import difflib
import inspect
from collections.abc import Callable, Mapping

from compress_core.errors import ConfigError
from compress_core.method import Method
from compress_core.methods.asvd import asvd
from compress_core.methods.svd import svd
from compress_core.methods.svd_llm import svd_llm

METHODS: dict[str, Callable[..., Method]] = {"svd": svd, "asvd": asvd, "svd_llm": svd_llm}

OptionValue = str | int | float | bool


def build_method(name: str, options: Mapping[str, OptionValue] | None = None) -> Method:
    """The method called ``name`` with its options, each at the paper's default unless given.

    Args:
        name: A key of ``METHODS``.
        options: Keyword arguments of the method's function; text is read as the default's type.

    Raises:
        ConfigError: Unknown method, unknown option, or a value of the wrong kind or range.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"unknown method {name!r}.{hint} Methods: {', '.join(METHODS)}")
    parameters = inspect.signature(METHODS[name]).parameters
    values = {}
    for option, given in (options or {}).items():
        if option not in parameters:
            known = ", ".join(parameters) or "none"
            raise ConfigError(f"method {name!r} has no option {option!r}; its options: {known}")
        values[option] = _read_option(name, option, given, parameters[option].default)
    return METHODS[name](**values)


def _read_option(method: str, option: str, given: OptionValue, default: OptionValue) -> OptionValue:
    """``given`` as the type of the option's default."""
    wanted = type(default)
    if wanted is bool and isinstance(given, str) and given.lower() in ("true", "false"):
        return given.lower() == "true"
    if isinstance(given, wanted) and (wanted is bool or not isinstance(given, bool)):
        return given
    try:
        if wanted is bool or isinstance(given, bool):
            raise ValueError(given)
        return wanted(given)
    except ValueError:
        raise ConfigError(
            f"option {option!r} of method {method!r} must be a {wanted.__name__}, got {given!r}"
        ) from None
