"""Whether MLflow will take at the end what a run brings, asked before any work and within seconds.

What the end makes once for all runs (experiment, registered model) is made here already; what it
makes for each run is asked for in a form that a server refuses only after it has looked at the
permission.
"""

from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from tasks.tracking.client import EXPERIMENT, experiment_id, make_model
from tasks.tracking.speaking import alone, impatient, is_database, is_server, speaking, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHECKED = "eigenpress.checked"  # tag of the experiment in a database, and folder of a check's file
UNTAKEN = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")  # what was asked for is wrong, not who asks


def check_tracking(home: Path, models: Iterable[str] = ()) -> None:
    """Makes sure that runs can be tracked and models registered.

    Args:
        home: The data directory.
        models: Names under which models will be registered.

    Raises:
        TrackingError: The server does not answer, refuses something, or cannot be written to.
    """
    with impatient():
        with speaking(home, f"to show or make the experiment {EXPERIMENT!r}") as client:
            experiment = experiment_id(client, home, EXPERIMENT)
        with speaking(home, f"to make a run in the experiment {EXPERIMENT!r}") as client:
            _run(client, home, experiment)
        for name in models:
            with speaking(home, f"to register a version of {name!r}") as client:
                _version(client, home, name)
        with speaking(home, "to show the experiment") as client:
            location = client.get_experiment(experiment).artifact_location
        with speaking(home, f"to keep files at {location}"), alone(home):
            _file(location, tracking_uri(home))


def _run(client: "MlflowClient", home: Path, experiment: str) -> None:
    """A write into a database; of a server the run that it will not take, for its two names."""
    from mlflow.exceptions import MlflowException

    if is_database(tracking_uri(home)):
        with alone(home):
            client.set_experiment_tag(experiment, CHECKED, datetime.now(UTC).isoformat())
        return
    try:
        run = client.create_run(experiment, run_name="check", tags={"mlflow.runName": "no check"})
    except MlflowException as error:
        if error.error_code not in UNTAKEN:
            raise
    else:
        client.delete_run(run.info.run_id)


def _version(client: "MlflowClient", home: Path, name: str) -> None:
    """The registered model itself; of one that a server has already, a version from nowhere."""
    from mlflow.exceptions import MlflowException

    if make_model(client, name) or not is_server(tracking_uri(home)):
        return
    try:
        version = client.create_model_version(name, "", await_creation_for=0)
    except MlflowException as error:
        if error.error_code not in UNTAKEN:
            raise
    else:
        client.delete_model_version(name, version.version)


def _file(location: str, uri: str) -> None:
    """A file where the runs' files go, and away again where that is allowed."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    files = get_artifact_repository(location, tracking_uri=uri)
    with TemporaryDirectory() as folder:
        file = Path(folder, "check.txt")
        file.write_text("Eigenpress looked whether it may write here.\n", encoding="utf-8")
        files.log_artifact(str(file), CHECKED)
    with suppress(Exception):
        files.delete_artifacts(CHECKED)
