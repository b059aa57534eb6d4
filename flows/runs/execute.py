"""An opened command is run: one run, a sweep, or a search.

The flows of deployments open the command themselves; the command line has done so before.
Prefect reads the annotations of flows at run time, so they are not postponed here.
"""

from typing import Any

from prefect import flow

from flows.report.console import Reporter
from flows.runs.opened import Opened, open_command
from flows.runs.run import in_flow, run_in_flow, run_pipeline
from flows.runs.sweep import run_sweep
from flows.runs.target import run_search
from flows.settings.config import RunConfig, Settings, SweepConfig


def execute(opened: Opened) -> Any:
    """Runs an opened command inside a flow; a result, or of a sweep a list of them."""
    opened.prepare()
    if isinstance(opened.settings, SweepConfig):
        return run_sweep(opened)
    if opened.searched:
        return run_search(opened)
    return run_pipeline(opened, opened.pipelines[0])


def execute_in_flow(opened: Opened) -> Any:
    """The same as a flow run of its own."""
    settings = opened.settings
    if isinstance(settings, SweepConfig):
        run_name = f"{settings.methods} kept {settings.kept} · {settings.model}"
        return in_flow("eigenpress sweep", run_name, settings, lambda: run_sweep(opened))
    if opened.searched:
        (pipeline,) = opened.pipelines
        wanted = opened.settings.model_dump()["target_perplexity"]
        run_name = f"{pipeline.config.method} perplexity {wanted} · {settings.model}"
        return in_flow("eigenpress target", run_name, settings, lambda: run_search(opened))
    return run_in_flow(opened, opened.pipelines[0])


def _deployed(config: Settings) -> Any:
    return execute(open_command(config, Reporter(stderr=True)))


@flow(
    name="eigenpress run",
    flow_run_name="{config.label} kept {config.kept} · {config.model}",
    persist_result=False,
)
def run_flow(config: RunConfig) -> dict[str, Any]:
    """Compresses one model with one method at one budget, or looks for the budget.

    Args:
        config: What is asked for.

    Returns:
        The result, as ``eigenpress run --json`` prints it.
    """
    result: dict[str, Any] = _deployed(config)
    return result


@flow(
    name="eigenpress sweep",
    flow_run_name="{config.methods} kept {config.kept} · {config.model}",
    persist_result=False,
)
def sweep_flow(config: SweepConfig) -> list[dict[str, Any]]:
    """Runs several methods at several budgets.

    Args:
        config: What is asked for.

    Returns:
        A result per run, methods outermost.
    """
    results: list[dict[str, Any]] = _deployed(config)
    return results
