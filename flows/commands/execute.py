"""What `run`, `sweep` and `demo` do between the command line and the flow."""

from pathlib import Path
from typing import Any

from flows.report.console import Reporter
from flows.report.files import PAGE, check_report, write_report
from flows.runs.opened import open_command
from flows.server import runtime
from flows.settings.command import report_command
from flows.settings.config import Settings, SweepConfig
from flows.settings.output import check_place
from tasks.tracking.check import check_tracking


def run_command(settings: Settings, as_json: bool) -> Any:
    """Checks everything that can be refused, then runs the flow and says how it went."""
    reporter = Reporter(stderr=as_json)
    opened = open_command(settings, reporter)
    if isinstance(settings, SweepConfig):
        report = report_folder(settings, opened.workspace.model.name)
        check_place("--report", report, opened.workspace.model.folder, settings.home)
        check_report(report)
        opened.page = report / PAGE
    opened.prepare()
    from flows.runs.execute import execute_in_flow

    with runtime.flow_settings(reporter.working):
        result = execute_in_flow(opened)
        if isinstance(settings, SweepConfig):
            return tell_sweep(reporter, settings.home.expanduser(), report, result)
        reporter.summary(result)
        version = "{name}/{version}".format(**result["registered"])
        reporter.entry("report", report_command(version, settings.home))
        return result


def demo_command(home: Path, as_json: bool) -> Any:
    """Runs the demonstration and says how it went."""
    from compress_core.hf.pretrain import PretrainSettings
    from flows.runs.demo import PROMPT, demo_words, run_demo

    reporter = Reporter(stderr=as_json)
    check_tracking(home)
    with runtime.flow_settings(reporter.working):
        results = run_demo(home, PretrainSettings(), reporter)
        folder = home / "reports" / "demo"
        tell_sweep(reporter, home, folder, results)
        reporter.demonstration(PROMPT, demo_words(home, results), folder, results)
        return results


def report_folder(settings: SweepConfig, model: str) -> Path:
    """--report, or a folder named after the model under the data directory."""
    return (settings.report or settings.home / "reports" / model).expanduser().absolute()


def tell_sweep(reporter: Reporter, home: Path, folder: Path, results: list[dict[str, Any]]) -> Any:
    """The table of a sweep, and where its report is."""
    from flows.runs.page import write_sweep_page

    reporter.table(results)
    with reporter.working("report"):
        write_report(folder, results)
        page = write_sweep_page(home, folder, reporter.note)
    reporter.say(f"report       {folder}  (report.html, table.md, results.json, pictures)")
    if page.problem:
        reporter.note(f"the page is not with all of its runs: {page.problem}")
    return results
