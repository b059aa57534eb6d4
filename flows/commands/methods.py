"""What `methods` prints: methods and allocators, what they are, their papers and options."""

import inspect
from collections.abc import Callable
from typing import Any

from compress_core.allocate import ALLOCATORS, allocator_options, build_allocator
from compress_core.methods import METHODS, build_method
from flows.report.lines import make_console, say

Print = Callable[[Any], None]
NAMES = 14  # width of the names


def list_methods(as_json: bool, print_json: Print) -> None:
    """A line per method and per allocator: what it is, its paper, options and their defaults."""
    rows: list[dict[str, Any]] = []
    for name, factory in METHODS.items():
        method = build_method(name)
        parameters = inspect.signature(factory).parameters
        rows.append(
            {
                "kind": "method",
                "name": name,
                "summary": method.summary,
                "paper": method.paper,
                "options": {option: p.default for option, p in parameters.items()},
                "needs_calibration": method.needs_calibration,
            }
        )
    for name, kind in ALLOCATORS.items():
        options = allocator_options(name)
        rows.append(
            {
                "kind": "allocator",
                "name": name,
                "summary": (kind.__doc__ or "").partition("\n")[0].rstrip("."),
                "options": {option: getattr(build_allocator(name), option) for option in options},
            }
        )
    if as_json:
        print_json(rows)
        return
    console = make_console()
    heading = "--allocate"
    for row in rows:
        if row["kind"] == "allocator" and heading:
            say(console, "")
            say(console, heading)
            heading = ""
        paper = f" (arXiv {row['paper']})" if row.get("paper") else ""
        say(console, f"{row['name']:<{NAMES}} {row['summary']}{paper}", NAMES + 1)
        given = ", ".join(f"{name}={value}" for name, value in row["options"].items())
        if given:
            say(console, f"{'':<{NAMES}} {given}", NAMES + 1)
