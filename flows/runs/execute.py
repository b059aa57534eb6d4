"""An opened command is run: one run, a sweep, or a search.

The flows of deployments open the command themselves; the command line has done so before.
Prefect reads the annotations of flows at run time, so they are not postponed here.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows.report.console import Reporter
from flows.runs.opened import Opened, open_command
from flows.runs.run import in_flow, run_in_flow, run_pipeline
from flows.runs.sweep import run_sweep
from flows.runs.target import run_search
from flows.server.workers import Workers
from flows.settings.checks import workers_of
from flows.settings.config import RunConfig, Settings, SweepConfig
from flows.settings.fields import HERE
from storage.occupancy import in_use


def execute_in_flow(opened: Opened) -> Any:
    """Runs a prepared command as a flow run of its own; a result, or of a sweep a list of them."""
    with _working(opened):
        return _flow_of(opened)


@contextmanager
def _working(opened: Opened) -> Iterator[None]:
    """For the time of a command: nothing is freed, and others compute where that was asked for."""
    settings = opened.settings
    with in_use(opened.workspace.store.root), ExitStack() as stack:
        if settings.runner != HERE:
            home = settings.home.expanduser()
            workers = Workers(settings.runner, workers_of(settings), settings.cluster, home)
            opened.workers = stack.enter_context(workers)
        yield


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


def _deployed(config: Settings, register_unchanged: bool) -> State[Any]:
    """The command's result, in a state whose message says what came of it."""
    opened = open_command(config, Reporter(stderr=True))
    opened.register_unchanged = register_unchanged
    opened.prepare()
    with _working(opened):
        result = _run(opened)
    message = outcome_of(result if isinstance(result, list) else [result])
    get_run_logger().info(message)
    return Completed(message=message, data=result)


def outcome_of(results: Sequence[Mapping[str, Any]]) -> str:
    """What a scheduled run came to, for people who look at the list of runs in the morning."""
    units = [s["state"] for r in results for s in r["stages"] if s["name"] != "register"]
    cached, computed = units.count("cached"), units.count("computed")
    models = [result["registered"] for result in results]
    new = [model for model in models if not model.get("unchanged")]
    names = ", ".join(f"{model['name']} version {model['version']}" for model in new or models)
    if new:
        return f"{computed} units computed, {cached} cached; new: {names}"
    work = f"{computed} units made again" if computed else f"all {cached} units cached"
    return f"nothing changed: {work}, still {names}"


@flow(
    name="eigenpress run",
    flow_run_name="{config.label} kept {config.kept} · {config.model}",
    persist_result=False,
)
def run_flow(config: RunConfig, register_unchanged: bool = False) -> State[dict[str, Any]]:
    """Compresses one model with one method at one budget, or looks for the budget.

    Args:
        config: What is asked for.
        register_unchanged: Whether a model that is registered already, from the same artifacts,
            becomes another version, as with ``eigenpress run``.

    Returns:
        The result, as ``eigenpress run --json`` prints it.
    """
    return _deployed(config, register_unchanged)


@flow(
    name="eigenpress sweep",
    flow_run_name="{config.methods} kept {config.kept} · {config.model}",
    persist_result=False,
)
def sweep_flow(
    config: SweepConfig, register_unchanged: bool = False
) -> State[list[dict[str, Any]]]:
    """Runs several methods at several budgets.

    Args:
        config: What is asked for.
        register_unchanged: Whether models that are registered already, from the same artifacts,
            become other versions, as with ``eigenpress sweep``.

    Returns:
        A result per run, methods outermost.
    """
    return _deployed(config, register_unchanged)
