"""The one file that speaks to MLflow: runs, registered models, and the keys they hold on to.

MLflow is imported inside the functions (it takes more than a second). Everything goes through one
client per address; MLflow's global state (active run, current address) is neither read nor set.
"""

import fcntl
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tasks.tracking.limits import (
    METRICS_PER_CALL,
    NAMES_PER_CALL,
    clip,
    fit_name,
    is_number,
    join,
    lay_out,
    pieces,
    public,
    split,
    thin,
    why_silent,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

# Defaults, set before MLflow is imported: it prints addresses on stdout, logs every version it
# registers and reports its use.
QUIET = {
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # what goes wrong is raised, and said once
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
KEY_TAG = "keys."
VERSIONS_PER_PAGE = 1000


class TrackingError(RuntimeError):
    """MLflow cannot be reached or refuses what it was given."""


@dataclass(frozen=True)
class Registered:
    """A version of a registered model."""

    name: str
    version: int


@dataclass(frozen=True)
class Version:
    """A version of a registered model with what was recorded about it.

    Attributes:
        name: The registered model.
        version: Counts from 1.
        source: Where its files are, as a URI.
        run_id: The run that made it.
        created: Seconds since 1970.
        tags: Joined again where a value had to be split.
    """

    name: str
    version: int
    source: str
    run_id: str
    created: float
    tags: dict[str, str]


def tracking_uri(home: Path) -> str:
    """The address in `MLFLOW_TRACKING_URI`, or else a SQLite file in the data directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home.resolve() / 'mlflow.db'}"


def check_tracking(home: Path) -> None:
    """Make sure that MLflow can be used, within seconds; call it before any work.

    Raises:
        TrackingError: The server does not answer, or the database cannot be opened.
    """
    uri = tracking_uri(home)
    if (reason := why_silent(uri)) is not None:
        raise TrackingError(
            f"no MLflow server answers at {public(uri)} ({reason}); start it, or unset "
            "MLFLOW_TRACKING_URI to track in the data directory"
        )
    with _speaking(home) as client:
        client.search_experiments(max_results=1)


def record_run(
    home: Path,
    *,
    experiment: str,
    run_name: str,
    parameters: Mapping[str, Any],
    metrics: Mapping[str, float],
    artifacts: Mapping[str, Path | str],
    tags: Mapping[str, str],
    curves: Mapping[str, Sequence[float]] | None = None,
) -> str:
    """Record one finished run, each kind of entry in as few calls as MLflow allows.

    What is too long is clipped and marked; a metric that is no number is left out, and of a curve
    with very many points some.

    Args:
        home: The data directory.
        experiment: Made when it does not exist.
        run_name: As shown in MLflow's list.
        parameters: Flat; values are written as text.
        metrics: Name to number.
        artifacts: Path inside the run to a file, a folder, or the text itself.
        tags: Name to text.
        curves: Name to a value per step, not-a-number where a step has none; kept as the history
            of a metric.

    Returns:
        The run's id.

    Raises:
        TrackingError: MLflow cannot be reached or refuses.
    """
    with _speaking(home) as client:
        from mlflow.entities import Metric, Param, RunTag

        run = client.create_run(_experiment(client, home, experiment), run_name=run_name)
        run_id, now = run.info.run_id, run.info.start_time
        status = "FAILED"
        try:
            for some in pieces(parameters.items(), NAMES_PER_CALL):
                client.log_batch(run_id, params=[Param(fit_name(k), clip(str(v))) for k, v in some])
            for some in pieces(tags.items(), NAMES_PER_CALL):
                client.log_batch(run_id, tags=[RunTag(fit_name(k), clip(str(v))) for k, v in some])
            numbers = [
                Metric(fit_name(k), float(v), now, 0) for k, v in metrics.items() if is_number(v)
            ]
            numbers += [
                Metric(fit_name(name), value, now, step)
                for name, curve in (curves or {}).items()
                for step, value in thin(curve)
            ]
            for group in pieces(numbers, METRICS_PER_CALL):
                client.log_batch(run_id, metrics=group)
            if artifacts:
                with tempfile.TemporaryDirectory() as folder:
                    lay_out(artifacts, Path(folder))
                    client.log_artifacts(run_id, folder)
            status = "FINISHED"
        finally:
            client.set_terminated(run_id, status)
    return str(run_id)


def register_model(
    home: Path, *, name: str, model_dir: Path, run_id: str, tags: Mapping[str, str]
) -> Registered:
    """Register a model folder as the next version of a name.

    A tracking server gets the files as artifacts of the run. Without one the folder itself is the
    version's source: no gigabyte is copied, and removing the folder removes the version's files.

    Raises:
        TrackingError: MLflow cannot be reached or refuses.
    """
    with _speaking(home) as client:
        from mlflow.exceptions import MlflowException

        source = model_dir.resolve().as_uri()
        if urlsplit(tracking_uri(home)).scheme in ("http", "https"):
            client.log_artifacts(run_id, str(model_dir), "model")
            source = f"runs:/{run_id}/model"
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        version = client.create_model_version(
            name, source, run_id, tags=_fitting(tags), await_creation_for=0
        )
        return Registered(name, int(version.version))


def _fitting(tags: Mapping[str, str]) -> dict[str, str]:
    return split({fit_name(name): value for name, value in tags.items()})


def read_tags(home: Path, name: str, version: int) -> dict[str, str]:
    """The tags of a registered version, joined again where they had to be split.

    Raises:
        TrackingError: There is no such version, or MLflow cannot be reached.
    """
    with _speaking(home) as client:
        return join(client.get_model_version(name, str(version)).tags)


def registered_versions(home: Path) -> list[Version]:
    """Every version of every registered model, by name and then by number.

    Raises:
        TrackingError: MLflow cannot be reached.
    """
    database = tracking_uri(home).removeprefix("sqlite:///")
    if "://" not in database and not Path(database).exists():
        return []  # asking would make the database, which takes seconds
    with _speaking(home) as client:
        found = [_version(one) for one in _all_versions(client)]
    return sorted(found, key=lambda one: (one.name, one.version))


def registered_keys(home: Path) -> set[str]:
    """The keys of all artifacts that a registered version was made from.

    They are the words, separated by commas or spaces, of the tags named `keys.<stage>`.

    Raises:
        TrackingError: MLflow cannot be reached.
    """
    return {
        key
        for version in registered_versions(home)
        for name, value in version.tags.items()
        if name.startswith(KEY_TAG)
        for key in re.split(r"[,\s]+", value)
        if key
    }


@contextmanager
def _speaking(home: Path) -> Iterator["MlflowClient"]:
    """A client for the length of a conversation; MLflow's errors become ours."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError  # MLflow lets some through, of a broken database

    uri = tracking_uri(home)
    try:
        yield _client(uri, home)
    except (MlflowException, SQLAlchemyError) as error:
        line = str(error).strip().splitlines()[0]
        raise TrackingError(f"MLflow at {public(uri)} refused: {line}") from error


@cache
def _client(uri: str, home: Path) -> "MlflowClient":
    from mlflow import MlflowClient

    home.mkdir(parents=True, exist_ok=True)
    with open(home / "mlflow.lock", "w") as lock:
        # Two processes that find the same fresh database must not both migrate it.
        fcntl.flock(lock, fcntl.LOCK_EX)
        client = MlflowClient(uri, os.environ.get("MLFLOW_REGISTRY_URI") or uri)
        if "://" in uri and urlsplit(uri).scheme not in ("http", "https"):
            client.search_experiments(max_results=1)
    return client


def _experiment(client: "MlflowClient", home: Path, name: str) -> str:
    """The id of an experiment, made when missing (another process may make it first)."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        remote = urlsplit(tracking_uri(home)).scheme in ("http", "https")
        location = None if remote else (home.resolve() / "mlartifacts").as_uri()
        try:
            return client.create_experiment(name, artifact_location=location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)
    if found is None or found.lifecycle_stage == "deleted":
        raise TrackingError(
            f"the MLflow experiment {name!r} was deleted; `mlflow experiments restore` undoes it"
        )
    return str(found.experiment_id)


def _all_versions(client: "MlflowClient") -> Iterator["ModelVersion"]:
    token = None
    while True:
        page = client.search_model_versions(max_results=VERSIONS_PER_PAGE, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _version(one: "ModelVersion") -> Version:
    created = one.creation_timestamp / 1000
    return Version(
        one.name, int(one.version), one.source or "", one.run_id or "", created, join(one.tags)
    )
