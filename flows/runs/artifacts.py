"""What Prefect shows on the page of a flow run beside its tasks: progress, the result, the model.

It is for people who look there, so whatever goes wrong with it is told and stops nothing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any
from urllib.parse import quote
from uuid import UUID

from compress_core.secrets import hide, hide_all
from tasks.tracking.speaking import is_server, tracking_uri

EVERY = 2.0  # seconds between two updates: each takes up to 65 ms
Note = Callable[[str], None]


class Progress:
    """How far a run's units are; a run that only finds what is cached has no time for it.

    Args:
        units: How many there are.
        note: Told once if Prefect does not take it.
    """

    def __init__(self, units: int, note: Note) -> None:
        self._units = max(1, units)
        self._note = note
        self._done = 0
        self._artifact: UUID | None = None
        self._last = perf_counter()

    def advance(self, stage: str, units: int) -> None:
        """So many units of a stage are done."""
        self._done += units
        if perf_counter() - self._last >= EVERY or (self._artifact and self._done == self._units):
            self._last = perf_counter()
            self._note = tried(lambda: self._show(stage), self._note)

    def _show(self, stage: str) -> None:
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        share = min(100.0, 100.0 * self._done / self._units)
        told = f"{stage}: {self._done} of {self._units} units"
        if self._artifact is None:
            made: Any = create_progress_artifact(share, "eigenpress-progress", told)
            self._artifact = made
        else:
            update_progress_artifact(self._artifact, share, told)


def show_run(home: Path, result: Mapping[str, Any], note: Note) -> None:
    """The numbers of a run as a table, and a link to what it made."""
    from prefect.artifacts import create_link_artifact, create_table_artifact

    registered = result["registered"]
    what = hide(f"{registered['name']} version {registered['version']}")

    def show() -> None:
        create_table_artifact([_row(result)], "eigenpress-result", what)
        create_link_artifact(_link(home, result), what, "eigenpress-model")

    tried(show, note)


def show_sweep(results: Sequence[Mapping[str, Any]], report: Path | None, note: Note) -> None:
    """The runs of a sweep as one table, and a link to its page where one is written."""
    from prefect.artifacts import create_link_artifact, create_table_artifact

    def show() -> None:
        create_table_artifact([_row(result) for result in results], "eigenpress-sweep")
        if report is not None:
            create_link_artifact(report.as_uri(), report.name, "eigenpress-report")

    tried(show, note)


def tried(show: Callable[[], None], note: Note) -> Note:
    """Shows something; where Prefect does not take it, says so and returns who is told no more."""
    try:
        show()
    except Exception as error:  # of httpx, Prefect and pydantic, each their own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        note(f"Prefect does not show this run's numbers ({hide(reason)}); the run goes on")
        return _silent
    return note


def _silent(_: str) -> None:
    """Told already."""


def _row(result: Mapping[str, Any]) -> dict[str, Any]:
    """A run in a table: what Prefect holds is JSON, which knows no infinity."""
    dense, found = result["metrics"]["dense"], result["metrics"]["compressed"]
    row = {
        "model": result["model"],
        "method": result["method"],
        "kept": result["kept"],
        "perplexity": found.get("perplexity"),
        "dense perplexity": dense.get("perplexity"),
        "KL": found.get("kl"),
        "parameters": result["parameters"]["compressed"],
        "MB on disk": round(result["bytes"]["compressed"] / 1e6, 3),
        "seconds": result["seconds"],
        "folder": result["model_dir"],
    }
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in hide_all(row).items()
        if value is not None
    }


def _link(home: Path, result: Mapping[str, Any]) -> str:
    """The version's page where a tracking server has one, else the model folder."""
    uri, registered = tracking_uri(home), result["registered"]
    if is_server(uri):
        place = f"#/models/{quote(registered['name'])}/versions/{registered['version']}"
        return f"{hide(uri).rstrip('/')}/{place}"
    return Path(result["model_dir"]).absolute().as_uri()
