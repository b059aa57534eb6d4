"""What the units of a sweep took on the processor, and what its runs would have taken alone."""

from collections.abc import Mapping, Sequence
from typing import Any

HOUR = 3600


def with_spent(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The results, each with what it took: "cpu_seconds", where that is on record for all.

    ``alone`` counts all that a run needs, whenever it was computed; ``added`` of that what no
    earlier run of the sweep needs. The registration, which is never kept, counts in neither.
    """
    counted: set[str] = set()
    found = []
    for result in results:
        units = [unit for unit in result.get("stages", ()) if unit["name"] != "register"]
        seconds = {unit["key"]: unit.get("cpu_seconds") for unit in units}
        if not seconds or None in seconds.values():
            return [dict(run) for run in results]
        added = sum(spent for key, spent in seconds.items() if key not in counted)
        counted |= set(seconds)
        spent = {"alone": round(sum(seconds.values()), 1), "added": round(added, 1)}
        found.append({**result, "cpu_seconds": spent})
    return found


def cost_lines(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a sweep took, as a paragraph and a table; nothing where that is not on record."""
    if not all("cpu_seconds" in run for run in results):
        return []
    together = sum(run["cpu_seconds"]["added"] for run in results)
    cold = sum(run["cpu_seconds"]["alone"] for run in results)
    budgets = sorted({run["kept"] for run in results}, reverse=True)
    alone = {(run["method"], run["kept"]): run["cpu_seconds"]["alone"] for run in results}
    lines = [
        "",
        f"What it took: {together / HOUR:.2f} CPU hours, what several runs share counted once; "
        f"each of the {len(results)} runs by itself, with nothing cached, {cold / HOUR:.2f} CPU "
        "hours in all. CPU seconds of a run by itself:",
        "",
        "| method | " + " | ".join(f"kept {kept:g}" for kept in budgets) + " |",
        "|---|" + "---|" * len(budgets),
    ]
    for method in dict.fromkeys(run["method"] for run in results):
        cells = [f"{alone[method, kept]:,.0f}" for kept in budgets]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines
