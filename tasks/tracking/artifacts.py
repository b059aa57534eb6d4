"""Files of a run in MLflow: read, and added once it has ended."""

import tempfile
from pathlib import Path

from tasks.tracking.limits import lay_out
from tasks.tracking.speaking import impatient, speaking


def read_file(home: Path, run_id: str, name: str) -> str:
    """The text of one of a run's artifacts.

    Args:
        home: The data directory.
        run_id: The run's.
        name: Path inside the run.

    Raises:
        TrackingError: There is none, or MLflow cannot be reached.
    """
    with tempfile.TemporaryDirectory() as folder, impatient():
        with speaking(home, f"to read {name} of run {run_id}") as client:
            found = client.download_artifacts(run_id, name, folder)
        return Path(found).read_text(encoding="utf-8")


def add_file(home: Path, run_id: str, name: str, file: Path) -> None:
    """Logs a file as an artifact of a run; one of that name is replaced.

    Raises:
        TrackingError: There is no such run, or MLflow cannot be reached or refuses.
    """
    with tempfile.TemporaryDirectory() as folder:
        lay_out({name: file}, Path(folder))
        with impatient(), speaking(home, f"to keep {name} with run {run_id}") as client:
            client.log_artifacts(run_id, folder)
