"""What the units of a sweep took on the processor, and what its runs would have taken alone."""

from collections.abc import Mapping, Sequence
from typing import Any

HOUR = 3600
SPENT = "cpu_seconds"
"""Where a result says what its units took: "alone" and "added"."""


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
        found.append({**result, SPENT: spent})
    return found


def spent_of(results: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    """CPU seconds of all runs, shared units once, and of each by itself; None if not on record."""
    if not all(SPENT in run for run in results):
        return None
    added, alone = (sum(r[SPENT][of] for r in results) for of in ("added", "alone"))
    return added, alone
