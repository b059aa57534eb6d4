"""The page of a run or a sweep: what is found of it, rendered, written and kept with the runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress_core.errors import ConfigError
from flows.report.console import Reporter
from flows.report.files import PAGE, check_report
from flows.report.page import render_page
from flows.report.shown import Sample, Shown
from flows.runs.asked import Asked, find_asked
from flows.runs.findings import Findings
from flows.runs.samples import LEFT_OUT, write_samples
from flows.settings.command import report_command, run_command, sweep_command
from storage.disk import make_folder, replace_file
from tasks.tracking.artifacts import add_file
from tasks.tracking.speaking import NoAnswerError, TrackingError

SWEEP_PAGE = "sweep.html"  # among the artifacts of its runs in MLflow; a run's own is PAGE


@dataclass(frozen=True)
class Page:
    """A page that was written.

    Attributes:
        file: Where.
        logged: Runs in MLflow that have it.
        problem: Why it is not with all of them; "" where it is.
    """

    file: Path
    logged: list[str]
    problem: str

    def as_json(self) -> dict[str, Any]:
        """As ``eigenpress report --json`` prints it."""
        return {"report": str(self.file), "runs": self.logged, "problem": self.problem or None}


def check_page(output: Path | None) -> Path | None:
    """The file that is asked for, as an absolute path.

    Raises:
        ConfigError: It is a folder, or its own folder cannot be written.
    """
    if output is None:
        return None
    file = output.expanduser().absolute()
    if file.is_dir():
        raise ConfigError(f"--output {output} is a folder; name the file of the page")
    check_report(file.parent, "--output")
    return file


def make_page(
    home: Path,
    asked: str | None,
    output: Path | None,
    generate: int,
    prompts: Sequence[str],
    reporter: Reporter,
) -> Page:
    """Finds what is asked for, lets the models write, writes the page, and says where it is.

    Args:
        home: Data directory.
        asked: As of `find_asked`.
        output: Where the page goes, if not below the data directory.
        generate: As of `write_samples`.
        prompts: As of `write_samples`.
        reporter: Who tells people.

    Raises:
        ConfigError, TrackingError: Nothing has that name.
        StorageError: The page cannot be written.
    """
    found = find_asked(home, asked, reporter.note)
    with reporter.working("report"):
        shown = shown_of(home, found)
        samples = write_samples(home, shown, generate, prompts, reporter.note)
        page = write_page(home, found, shown, samples, output or page_file(home, found))
    tell_page(page, reporter)
    return page


def tell_page(page: Page, reporter: Reporter) -> None:
    """Where a page is, and what became of it in MLflow."""
    reporter.entry("report", f"{page.file}  ({page.file.stat().st_size / 1e3:,.0f} kB)")
    if page.problem:
        reporter.note(f"the page is not with all of its runs: {page.problem}")


def write_sweep_page(home: Path, folder: Path, tell: Callable[[str], None]) -> Page:
    """The page beside a sweep's table, of the runs that have just been made; no model writes."""
    asked = find_asked(home, str(folder), tell)
    return write_page(home, asked, shown_of(home, asked), LEFT_OUT, folder / PAGE)


def page_file(home: Path, asked: Asked) -> Path:
    """Where a page goes unless somebody says: a folder of the report's name."""
    return home.absolute() / "reports" / asked.name / PAGE


def shown_of(home: Path, asked: Asked) -> list[Shown]:
    """Everything that is found of the runs."""
    findings = Findings(home)
    return [findings.of(fields) for fields in asked.runs]


def write_page(
    home: Path,
    asked: Asked,
    shown: Sequence[Shown],
    samples: Sequence[Sample] | str,
    file: Path,
) -> Page:
    """Renders the page, writes it, and logs it with its runs.

    Raises:
        StorageError: It cannot be written.
    """
    first = shown[0]
    title = f"{first.result['model']}: {'sweep' if asked.sweep else first.label}"
    text = render_page(title, shown, samples, _commands(asked, shown))
    make_folder(file.parent)
    replace_file(file, text.encode("utf-8"))
    logged: list[str] = []
    problem = ""
    for run in shown:
        run_id = run.result.get("run_id")
        try:
            if run_id:
                add_file(home, run_id, SWEEP_PAGE if asked.sweep else PAGE, file)
                logged.append(run_id)
        except TrackingError as error:
            problem = str(error)
            if isinstance(error, NoAnswerError):
                break  # each further run would wait as long
    return Page(file, logged, problem)


def _commands(asked: Asked, shown: Sequence[Shown]) -> list[str]:
    configs = [run.config for run in shown if run.config is not None]
    if len(configs) < len(shown):
        return []
    runs = sweep_command(configs) if asked.sweep else [run_command(configs[0])]
    return [*runs, report_command(asked.name, Path(str(configs[0]["home"])))]
