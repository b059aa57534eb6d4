"""The page of a run or a sweep: what is found of it, rendered, written and kept with the runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flows.report.page import render_page
from flows.report.shown import Sample, Shown
from flows.runs.asked import Asked
from flows.runs.findings import Findings
from flows.settings.command import run_command, sweep_command
from storage.disk import make_folder, replace_file
from tasks.tracking.artifacts import add_file
from tasks.tracking.speaking import TrackingError

RUN_PAGE, SWEEP_PAGE = "report.html", "sweep.html"  # among a run's artifacts in MLflow


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
                add_file(home, run_id, SWEEP_PAGE if asked.sweep else RUN_PAGE, file)
                logged.append(run_id)
        except TrackingError as error:
            problem = str(error)
    return Page(file, logged, problem)


def _commands(asked: Asked, shown: Sequence[Shown]) -> list[str]:
    configs = [run.config for run in shown if run.config is not None]
    if len(configs) < len(shown):
        return []
    runs = sweep_command(configs) if asked.sweep else [run_command(configs[0])]
    return [*runs, f"eigenpress report {asked.name}"]
