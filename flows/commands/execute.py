"""What `run`, `sweep` and `demo` do between the command line and the flow."""

from pathlib import Path
from typing import Any

from flows.report.console import Reporter, current_reporter
from flows.report.files import check_report, write_report
from flows.runs.budget import MOST, at_share, resolve_budget
from flows.runs.pipeline import build_pipeline
from flows.runs.workspace import open_workspace, read_texts
from flows.server import runtime
from flows.settings.checks import check_methods
from flows.settings.config import RunConfig, Settings, SweepConfig
from tasks.tracking.client import check_tracking


def run_command(settings: Settings, as_json: bool) -> Any:
    """Checks everything that can be refused, then runs the flow and says how it went."""
    reporter = Reporter(stderr=as_json)
    if isinstance(settings, SweepConfig):
        runs = settings.runs()
    else:
        assert isinstance(settings, RunConfig)
        runs = [settings]
    check_methods(
        settings,
        list({run.method: None for run in runs}),
        [run.kept for run in runs if run.kept is not None],
    )
    workspace = open_workspace(settings)
    if isinstance(settings, RunConfig):
        settings = resolve_budget(workspace, settings)
        # Of a search nothing is known yet; what is refused at a mild share is refused at all.
        runs = [settings if settings.kept is not None else at_share(settings, MOST)]
    pipelines = [build_pipeline(workspace, run) for run in runs]
    if isinstance(settings, SweepConfig):
        report = report_folder(settings, workspace.model.name)
        check_report(report)
    needed = any(p.job.method.needs_calibration for p in pipelines) or settings.recovery is not None
    with reporter.working("reading"):
        read_texts(workspace, needed)
    from flows.runs.run import current_workspace, run_flow
    from flows.runs.sweep import sweep_flow
    from flows.runs.target import target_flow

    check_tracking(settings.home.expanduser())
    for note in workspace.notes:
        reporter.note(note)
    told = current_reporter.set(reporter)
    token = current_workspace.set(workspace)
    try:
        with runtime.flow_settings():
            if isinstance(settings, SweepConfig):
                return tell_sweep(reporter, report, sweep_flow(settings))
            searched = settings.target_perplexity is not None
            result = (target_flow if searched else run_flow)(settings)
            reporter.summary(result)
            return result
    finally:
        current_workspace.reset(token)
        current_reporter.reset(told)


def demo_command(home: Path, as_json: bool) -> Any:
    """Runs the demonstration and says how it went."""
    from compress_core.hf.pretrain import PretrainSettings
    from flows.runs.demo import PROMPT, demo_flow, demo_words

    reporter = Reporter(stderr=as_json)
    check_tracking(home)
    told = current_reporter.set(reporter)
    try:
        with runtime.flow_settings():
            results = demo_flow(home, PretrainSettings())
            folder = home / "reports" / "demo"
            tell_sweep(reporter, folder, results)
            reporter.demonstration(PROMPT, demo_words(home, results), folder, results)
            return results
    finally:
        current_reporter.reset(told)


def report_folder(settings: SweepConfig, model: str) -> Path:
    """--report, or a folder named after the model under the data directory."""
    return (settings.report or settings.home / "reports" / model).expanduser().absolute()


def tell_sweep(reporter: Reporter, folder: Path, results: list[dict[str, Any]]) -> Any:
    """The table of a sweep, and where its report is."""
    reporter.table(results)
    write_report(folder, results)
    reporter.say(f"report       {folder}  (table.md, results.json, pictures)")
    return results
