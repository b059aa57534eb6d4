"""What `methods` prints: methods by family and allocators, their papers, options and defaults.

What an option means is said where it is defined, in the docstring of the method.
"""

import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any

from compress_core.allocate import (
    ALLOCATORS,
    DEVICE,
    DEVICE_ABOUT,
    allocator_options,
    build_allocator,
)
from compress_core.errors import ConfigError
from compress_core.method import Method
from compress_core.methods import METHODS, OF_ALL, build_method, option_defaults
from compress_core.options import nearest
from flows.commands.look import broken
from flows.report.lines import make_console, say
from flows.settings.config import DEFAULT_METHOD

Print = Callable[[Any], None]
NAMES = 15  # columns of the names
OPTIONS = 26  # columns of options and defaults, behind two blanks

DECOMPOSED = "Decomposed: factors of low rank, each layer by itself or behind the compressed ones"
PRUNED = "Pruned: sparse entries, some with factors beside them"
ROUNDED = "Rounded: every number stays, in codes of few bits"
LEARNED = "Learned: trained on the whole model what every layer keeps"
ALLOCATED = "Allocators: how the budget is divided (--allocate NAME, or METHOD@NAME)"


def list_methods(as_json: bool, print_json: Print) -> None:
    """Every method and allocator under its family: what it is, its paper, options and defaults."""
    rows = [_method_row(name) for name in METHODS] + [_allocator_row(name) for name in ALLOCATORS]
    if as_json:
        print_json(rows)
        return
    console = make_console()
    for family in (DECOMPOSED, PRUNED, ROUNDED, LEARNED, ALLOCATED):
        say(console, f"{family}:")
        for row in (row for row in rows if row["family"] == family):
            _say_row(console, row)
        say(console, "")
    say(
        console,
        f"A run that names no method takes {DEFAULT_METHOD}. `eigenpress methods NAME` says all of "
        "one of them.",
    )


def show_method(name: str, as_json: bool, print_json: Print) -> None:
    """One method or allocator in full: what is from its paper and what is not, too.

    Raises:
        ConfigError: There is none of that name.
    """
    if name not in METHODS and name not in ALLOCATORS:
        raise ConfigError(
            f"there is no method or allocator {name!r}{nearest(name, [*METHODS, *ALLOCATORS])}"
        )
    row = _method_row(name) if name in METHODS else _allocator_row(name)
    if as_json:
        print_json(row)
        return
    console = make_console()
    _say_row(console, row)
    for paragraph in [*_needs(name), *_background(name)]:
        say(console, "")
        say(console, paragraph)
    say(console, "")
    how = f"--method {name}" if name in METHODS else f"--allocate {name}"
    say(console, "Example:")
    example = f"eigenpress run --model ./my-llama --kept 0.8 {how} --calibration texts.jsonl"
    for line in broken(example, console.width - 2):
        say(console, f"  {line}")


def _method_row(name: str) -> dict[str, Any]:
    method = build_method(name)
    return {
        "kind": "method",
        "name": name,
        "family": _family(method),
        "summary": method.summary,
        "paper": method.paper,
        "options": option_defaults(name),
        "about": {option: about for option, (_, about) in OF_ALL.items()}
        | _about(METHODS[name].__doc__),  # its own words for an option of its own
        "needs_calibration": method.needs_calibration,
    }


def _family(method: Method) -> str:
    if method.learn is not None:
        return LEARNED
    return PRUNED if method.prunes else ROUNDED if method.rounds else DECOMPOSED


def _allocator_row(name: str) -> dict[str, Any]:
    kind = ALLOCATORS[name]
    options = allocator_options(name)
    return {
        "kind": "allocator",
        "name": name,
        "family": ALLOCATED,
        "summary": (kind.__doc__ or "").partition("\n")[0].rstrip("."),
        "options": {option: getattr(build_allocator(name), option, "") for option in options},
        "about": _about(kind.__doc__) | {DEVICE: DEVICE_ABOUT},
    }


def _about(docstring: str | None) -> dict[str, str]:
    """Option to what its docstring says of it, under Args or Attributes."""
    text = inspect.cleandoc(docstring or "")
    section = re.search(r"^(?:Args|Attributes):\n((?: +.*\n?|\n)+)", text, re.MULTILINE)
    if section is None:
        return {}
    entries = re.split(r"^(\w+): ", textwrap.dedent(section[1]), flags=re.MULTILINE)[1:]
    return {
        name: " ".join(said.split()) for name, said in zip(entries[::2], entries[1::2], strict=True)
    }


def _say_row(console: Any, row: dict[str, Any]) -> None:
    paper = f" (arXiv {row['paper']})" if row.get("paper") else ""
    say(console, f"{row['name']:<{NAMES}}{row['summary']}{paper}", NAMES)
    for option, default in row["options"].items():
        given = f"  {option}" if default is None else f"  {option}={_word(default)}"
        about = row["about"].get(option, "").replace("``", "`")
        if len(given) > OPTIONS:
            say(console, given)
            given = ""
        # say() would take blanks at the beginning for nothing
        say(console, f"{given:<{OPTIONS}} {about}", OPTIONS + 1)


def _word(default: Any) -> str:
    """A default as it would be typed."""
    if isinstance(default, bool):
        return str(default).lower()
    return f"{default:g}" if isinstance(default, float) else str(default)


def _needs(name: str) -> list[str]:
    if name not in METHODS:
        return []
    method: Method = build_method(name)
    text = "It reads calibration text" if method.needs_calibration else "It reads no text"
    order = ", and layers are done in order, each behind the compressed ones before it"
    own = method.prunes or method.rounds or method.learn
    divided = "" if own else f" --allocate: {_allocator_of(method)}."
    return [f"{text}{order if method.sequential else ''}.{divided}"]


def _allocator_of(method: Method) -> str:
    """The name of a method's own allocator."""
    kinds = {kind: name for name, kind in ALLOCATORS.items()}
    return kinds.get(type(method.allocate), "its own")


def _background(name: str) -> list[str]:
    """The paragraphs at the head of the file that defines it."""
    module = inspect.getmodule(METHODS.get(name) or ALLOCATORS[name])
    paragraphs = inspect.cleandoc((module and module.__doc__) or "").split("\n\n")
    return [" ".join(paragraph.split()).replace("``", "`") for paragraph in paragraphs]
