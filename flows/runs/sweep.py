"""Several methods and budgets on one model: activations and decompositions are shared by key."""

from typing import Any

from flows.runs.artifacts import show_sweep
from flows.runs.opened import Opened
from flows.runs.run import run_in_flow


def run_sweep(opened: Opened) -> list[dict[str, Any]]:
    """Runs every method at every budget.

    Returns:
        A result per run, methods outermost.
    """
    results = []
    for number, pipeline in enumerate(opened.pipelines, start=1):
        config = pipeline.config
        place = f"(run {number} of {len(opened.pipelines)})"
        opened.reporter.say(f"── {config.label} kept {config.kept:g}  {place}")
        results.append(run_in_flow(opened, pipeline))
    show_sweep(results, opened.page, opened.reporter.note)
    return results
