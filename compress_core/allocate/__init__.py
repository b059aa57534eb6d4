"""Ways to divide one budget among the layers, by the names that users type."""

import dataclasses
from collections.abc import Mapping

from compress_core.allocate.base import Allocator
from compress_core.allocate.by_type import ByType
from compress_core.allocate.fisher import Fisher
from compress_core.allocate.hull import Hull
from compress_core.allocate.importance import Importance
from compress_core.allocate.knapsack import Knapsack
from compress_core.allocate.prices import Prices
from compress_core.allocate.uniform import Uniform
from compress_core.errors import ConfigError
from compress_core.options import OptionValue, nearest, read_option

ALLOCATORS: dict[str, type[Allocator]] = {
    "uniform": Uniform,
    "by_type": ByType,
    "importance": Importance,
    "hull": Hull,
    "fisher": Fisher,
    "prices": Prices,
    "knapsack": Knapsack,
}

DEVICE = "device"
"""The option that every allocator has, read where a method is built."""
DEVICE_ABOUT = (
    "Leave dense what its factors would slow down: `here` measures this machine once, a file is "
    "what another one measured."
)


def allocator_options(name: str) -> list[str]:
    """Names of the options of an allocator, its own and :data:`DEVICE`.

    Raises:
        ConfigError: There is no such allocator.
    """
    return [*(field.name for field in _fields(name) if field.name != "candidates"), DEVICE]


def build_allocator(name: str, options: Mapping[str, OptionValue] | None = None) -> Allocator:
    """The allocator called ``name``.

    Args:
        name: A key of ``ALLOCATORS``.
        options: Its fields, without :data:`DEVICE`; text is read as the default's type.

    Raises:
        ConfigError: Unknown allocator or option, or a value of the wrong kind or range.
    """
    known = {field.name: field.default for field in _fields(name) if field.name != "candidates"}
    values = {}
    for option, given in (options or {}).items():
        if option not in known:
            raise ConfigError(
                f"allocator {name!r} has no option {option!r}; its options: "
                f"{', '.join(allocator_options(name)) or 'none'}"
                f"{nearest(option, allocator_options(name))}"
            )
        values[option] = read_option(f"allocator {name!r}", option, given, known[option])
    return ALLOCATORS[name](**values)


def _fields(name: str) -> tuple[dataclasses.Field, ...]:
    if name not in ALLOCATORS:
        hint = nearest(name, ALLOCATORS) or "."
        raise ConfigError(f"unknown allocator {name!r}{hint} Allocators: {', '.join(ALLOCATORS)}")
    return dataclasses.fields(ALLOCATORS[name])  # type: ignore[arg-type]
