"""Which runs of a sweep are drawn: the baselines and the best, few enough to tell apart."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

Run = Mapping[str, Any]
MOST_SERIES = 8  # lines in one picture, the dense model's among them
BASELINES = ("svd", "asvd", "svd_llm")
EXPLODED = 2  # times the worst baseline: such a row would press all others into one line


def sweep_series(runs: Sequence[Run]) -> list[str]:
    """The rows of a sweep that are drawn against size: baselines, then the best others.

    Every method shows its best row before any shows a second one, so that variants of one method do
    not fill the picture. "Best" is the perplexity at the smallest budget that all rows have.

    Args:
        runs: Results with a perplexity, on one model and text.

    Returns:
        At most ``MOST_SERIES - 1`` names as in a result's "method", from the worst to the best, as
        their lines lie at the smallest budget. Rows that exploded are not among them.
    """
    budgets: dict[str, dict[float, float]] = {}
    for run in runs:
        found = run["metrics"]["compressed"]["perplexity"]
        budgets.setdefault(run["method"], {})[run["kept"]] = found
    common = set.intersection(*(set(row) for row in budgets.values()))
    smallest = min(common or {run["kept"] for run in runs})
    least = {row: found.get(smallest, math.inf) for row, found in budgets.items()}
    ranked = sorted(least, key=least.__getitem__)
    baselines = {row for row in ranked if baseline(row) is not None}
    limit = EXPLODED * max((least[row] for row in baselines), default=math.inf)
    drawn = [row for row in ranked if row in baselines or least[row] <= limit]
    firsts = {_method(row): row for row in reversed(drawn) if row not in baselines}.values()

    def rank(row: str) -> tuple[bool, bool, int]:
        return row not in baselines, row not in firsts, ranked.index(row)

    return sorted(sorted(drawn, key=rank)[: MOST_SERIES - 1], key=ranked.index, reverse=True)


def training_series(runs: Sequence[Run]) -> list[Run]:
    """The trainings that are drawn step by step: those whose stored share moved.

    Args:
        runs: Results of runs, those of a training with "curves".

    Returns:
        At most ``MOST_SERIES`` of them: all budgets of a method or none, the first methods first,
        where one method alone does not fill the picture.
    """
    chosen: list[Run] = []
    for method in dict.fromkeys(run["method"] for run in runs):
        trained = [run for run in runs if run["method"] == method and _moved(run)]
        if not chosen or len(chosen) + len(trained) <= MOST_SERIES:
            chosen += trained[:MOST_SERIES]
    return chosen


def baseline(row: str) -> int | None:
    """Which baseline a row is, at its defaults and recovered or not; None for any other row."""
    name = row.partition("+")[0]
    return BASELINES.index(name) if name in BASELINES else None


def _method(row: str) -> str:
    return re.split("[@:+]", row)[0]


def _moved(run: Run) -> bool:
    return len(set(run.get("curves", {}).get("kept", ()))) > 1
