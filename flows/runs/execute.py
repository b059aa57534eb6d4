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
from storage.occupancy import in_use


def execute_in_flow(opened: Opened) -> Any:
    """Runs a prepared command as a flow run of its own; a result, or of a sweep a list of them."""
    with in_use(opened.workspace.store.root):
        return _flow_of(opened)


def _flow_of(opened: Opened) -> Any:
    settings = opened.settings
    if isinstance(settings, SweepConfig):
        name, run_name = "sweep", f"{settings.methods} kept {settings.kept} · {settings.model}"
    elif isinstance(settings, RunConfig) and opened.searched:
        wanted = f"perplexity {settings.target_perplexity}"
        name, run_name = "target", f"{settings.method} {wanted} · {settings.model}"
    else:
        return run_in_flow(opened, opened.pipelines[0])
    return in_flow(f"eigenpress {name}", run_name, settings, lambda: _run(opened))


def _run(opened: Opened) -> Any:
    """Whatever the command is, inside a flow."""
    if isinstance(opened.settings, SweepConfig):
        return run_sweep(opened)
    if opened.searched:
        return run_search(opened)
    return run_pipeline(opened, opened.pipelines[0])


def _deployed(config: Settings) -> Any:
    opened = open_command(config, Reporter(stderr=True))
    opened.prepare()
    with in_use(opened.workspace.store.root):
        return _run(opened)


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
