"""How far other processes are inside the groups that they have in hand.

Each writes it on the page of its task's run in Prefect, which all of them reach, and the command
reads it there. It is for people who wait: what goes wrong with it is told and stops nothing.
"""

from collections.abc import Collection
from dataclasses import dataclass
from time import perf_counter
from typing import Any
from uuid import UUID

from flows.runs.artifacts import Note, tried

EVERY = 5.0  # seconds between two writings, and between two readings: each takes up to 65 ms


@dataclass(frozen=True)
class Inside:
    """How far a group is.

    Attributes:
        label: Stage and group, and more.
        share: What is done of it.
    """

    label: str
    share: float


class Telling:
    """A session's listener that writes on the page of the task's run in hand.

    What takes less than a few seconds has no time for it.

    Args:
        note: Told once if Prefect does not take it.
    """

    def __init__(self, note: Note) -> None:
        self._note = note
        self._artifact: UUID | None = None
        self._last = perf_counter()

    def __call__(self, label: str, done: int, total: int) -> None:
        """So much of a group is done."""
        if perf_counter() - self._last >= EVERY:
            share = min(1.0, done / max(1, total))
            self._note = tried(lambda: self._show(f"{label}  {done}/{total}", share), self._note)
            self._last = perf_counter()

    def _show(self, label: str, share: float) -> None:
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        if self._artifact is None:
            made: Any = create_progress_artifact(100 * share, description=label)
            self._artifact = made
        else:
            update_progress_artifact(self._artifact, 100 * share, label)


class Reading:
    """What those of a command's task runs have written that go on.

    Args:
        note: Told once if Prefect does not say it.
    """

    def __init__(self, note: Note) -> None:
        self._note = note
        self._last = perf_counter()
        self._found: dict[UUID, Inside] = {}

    def of(self, runs: Collection[UUID]) -> dict[UUID, Inside]:
        """How far task runs are, those that have told it; a few seconds old at most."""
        if runs and perf_counter() - self._last >= EVERY:
            self._note = tried(lambda: self._read(runs), self._note)
            self._last = perf_counter()
        return {run: inside for run, inside in self._found.items() if run in runs}

    def _read(self, runs: Collection[UUID]) -> None:
        from prefect.client.orchestration import get_client
        from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterTaskRunId

        told = ArtifactFilter(task_run_id=ArtifactFilterTaskRunId(any_=list(runs)))
        with get_client(sync_client=True) as client:
            artifacts = client.read_artifacts(artifact_filter=told)
        self._found = {
            one.task_run_id: Inside(one.description or "", one.data / 100)
            for one in artifacts
            if one.task_run_id is not None and isinstance(one.data, float | int)
        }
