"""What `run`, `sweep` and `demo` do between the command line and the flow."""

from pathlib import Path
from typing import Any

from flows import runtime
from flows.config import RunConfig, Settings, SweepConfig
from flows.console import Reporter, current_reporter
from flows.prepare import build_pipeline, check_methods, open_workspace


def run_command(settings: Settings, as_json: bool) -> Any:
    """Checks everything that can be refused, then runs the flow and says how it went."""
    reporter = Reporter(stderr=as_json)
    if isinstance(settings, SweepConfig):
        runs = settings.runs()
    else:
        assert isinstance(settings, RunConfig)
        runs = [settings]
    check_methods(
        settings, list({run.method: None for run in runs}), [run.kept for run in runs]
    )
    workspace = open_workspace(settings)
    for run in runs:
        build_pipeline(workspace, run)
    from flows.run import check_tracking, current_workspace, run_flow
    from flows.sweep import sweep_flow

    check_tracking(workspace)
    for note in workspace.notes:
        reporter.say(f"note         {note}")
    current_reporter.set(reporter)
    current_workspace.set(workspace)
    with runtime.flow_settings():
        if isinstance(settings, SweepConfig):
            return tell_sweep(reporter, settings.home, sweep_flow(settings))
        result = run_flow(settings)
        reporter.summary(result)
        return result


def demo_command(home: Path, as_json: bool) -> Any:
    """Runs the demonstration and says how it went."""
    from compress_core.hf.pretrain import PretrainSettings
    from flows.demo import demo_flow
    from tasks.tracking import check_tracking

    reporter = Reporter(stderr=as_json)
    check_tracking(home)
    current_reporter.set(reporter)
    with runtime.flow_settings():
        return tell_sweep(reporter, home, demo_flow(home, PretrainSettings()))


def tell_sweep(reporter: Reporter, home: Path, results: list[dict[str, Any]]) -> Any:
    """The table and the plot of a sweep."""
    from flows.sweep import save_plot

    reporter.table(results)
    plot = save_plot(home, results)
    if plot is not None:
        reporter.say(f"plot: {plot}")
    return results
