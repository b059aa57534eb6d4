"""Which runs of a budget are the best, or cannot be told from it on the text that there is.

Runs are compared window by window: what is hard in a text is hard for all of them, so the mean of
the differences of two runs is known far better than either mean.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

ERRORS = 2.0  # standard errors of the mean difference
BEST_OR_NEAR = (
    f"the best of its budget, and what is within {ERRORS:g} standard errors of it, window by window"
)


def best_or_near(results: Sequence[Mapping[str, Any]], label: str) -> set[tuple[str, float]]:
    """Method and kept of the runs that are, where a budget has several.

    Args:
        results: Of a sweep; one whose windows are not on record is found where it is the best.
        label: The text.
    """
    found = set()
    for kept in {result["kept"] for result in results}:
        runs = {run["method"]: run for run in results if run["kept"] == kept}
        if len(runs) < 2:
            continue
        best = min(runs, key=lambda name: _perplexity(runs[name], label))
        nlls = {
            name: run["windows"]["compressed"][label]
            for name, run in runs.items()
            if "windows" in run and "windows" in runs[best]
        }
        near = {name for name, own in nlls.items() if not_worse(own, nlls[best])}
        found |= {(name, kept) for name in near | {best}}
    return found


def _perplexity(run: Mapping[str, Any], label: str) -> float:
    return float(run["metrics"]["compressed"]["texts"][label]["perplexity"])


def not_worse(own: Sequence[float], best: Sequence[float]) -> bool:
    """Whether a mean is above the best one by no more than ERRORS standard errors of that.

    Args:
        own: A run's negative log likelihood of every window, nats per token.
        best: Those of the best run, on the same windows.
    """
    gaps = [mine - other for mine, other in zip(own, best, strict=True)]
    error = stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else 0.0
    return fmean(gaps) <= ERRORS * error
