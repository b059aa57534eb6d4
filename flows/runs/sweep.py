"""Several methods and budgets on one model: activations and decompositions are shared by key."""

from typing import Any

from prefect import flow

from flows.report.console import get_reporter
from flows.runs.pipeline import build_pipeline
from flows.runs.run import current_workspace, run_flow
from flows.runs.workspace import open_workspace
from flows.settings.checks import check_methods
from flows.settings.config import SweepConfig


@flow(
    name="eigenpress sweep",
    flow_run_name="{config.methods} kept {config.kept} · {config.model}",
    persist_result=False,
)
def sweep_flow(config: SweepConfig) -> list[dict[str, Any]]:
    """Runs every method at every budget.

    Args:
        config: What is asked for.

    Returns:
        A result per run, methods outermost.
    """
    workspace = current_workspace.get()
    if workspace is None:
        check_methods(config, config.methods, config.kept)
        workspace = open_workspace(config)
        for run in config.runs():  # what cannot be met is refused before the first run starts
            build_pipeline(workspace, run)
    runs = config.runs()
    token = current_workspace.set(workspace)
    results = []
    try:
        for number, run in enumerate(runs, start=1):
            get_reporter().say(f"── {run.label} kept {run.kept:g}  (run {number} of {len(runs)})")
            results.append(run_flow(run))
    finally:
        current_workspace.reset(token)
    return results
