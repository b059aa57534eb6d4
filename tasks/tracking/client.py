"""What is kept in MLflow: runs, registered models, and the keys they hold on to."""

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.tracking.files import files_tag
from tasks.tracking.limits import (
    METRICS_PER_CALL,
    NAMES_PER_CALL,
    clip,
    fit_name,
    is_number,
    join,
    lay_out,
    pieces,
    split,
    thin,
)
from tasks.tracking.speaking import (
    TrackingError,
    impatient,
    is_database,
    is_server,
    speaking,
    tracking_uri,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import RunInfo
    from mlflow.entities.model_registry import ModelVersion

EXPERIMENT = "eigenpress"
KEY_TAG = "keys."
VERSIONS_PER_PAGE = 1000


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
    numbers = [(fit_name(k), float(v), 0) for k, v in metrics.items() if is_number(v)]
    numbers += [
        (fit_name(name), value, step)
        for name, curve in (curves or {}).items()
        for step, value in thin(curve)
    ]
    with tempfile.TemporaryDirectory() as folder:
        lay_out(artifacts, Path(folder))
        with speaking(home, "to record the run") as client:
            run = client.create_run(experiment_id(client, home, experiment), run_name=run_name)
            with _ending(client, run.info.run_id):
                _fill(client, run.info, parameters, tags, numbers)
                if artifacts:
                    client.log_artifacts(run.info.run_id, folder)
    return str(run.info.run_id)


def _fill(
    client: "MlflowClient",
    info: "RunInfo",
    parameters: Mapping[str, Any],
    tags: Mapping[str, str],
    numbers: Sequence[tuple[str, float, int]],
) -> None:
    """Parameters, tags, and numbers with their steps, as many in a call as MLflow takes."""
    from mlflow.entities import Metric, Param, RunTag

    for some in pieces(parameters.items(), NAMES_PER_CALL):
        params = [Param(fit_name(name), clip(str(value))) for name, value in some]
        client.log_batch(info.run_id, params=params)
    for some in pieces(tags.items(), NAMES_PER_CALL):
        run_tags = [RunTag(fit_name(name), clip(str(value))) for name, value in some]
        client.log_batch(info.run_id, tags=run_tags)
    for group in pieces(numbers, METRICS_PER_CALL):
        points = [Metric(name, value, info.start_time, step) for name, value, step in group]
        client.log_batch(info.run_id, metrics=points)


@contextmanager
def _ending(client: "MlflowClient", run_id: str) -> Iterator[None]:
    """Marks a run as finished, or as failed where the server still takes that."""
    try:
        yield
        client.set_terminated(run_id, "FINISHED")
    except BaseException:
        with impatient(), suppress(Exception):
            client.set_terminated(run_id, "FAILED")
        raise


def register_model(
    home: Path, *, name: str, model_dir: Path, run_id: str, tags: Mapping[str, str]
) -> Registered:
    """Register a model folder as the next version of a name.

    A tracking server gets the files as artifacts of the run. Without one the folder itself is the
    version's source: no gigabyte is copied, and removing the folder removes the version's files.
    The digests of its files are recorded with the version.

    Raises:
        TrackingError: MLflow cannot be reached or refuses, or a file cannot be read.
    """
    tags = {**tags, **files_tag(model_dir)}
    with speaking(home, f"to register a version of {name!r}") as client:
        source = model_dir.resolve().as_uri()
        if is_server(tracking_uri(home)):
            client.log_artifacts(run_id, str(model_dir), "model")
            source = f"runs:/{run_id}/model"
        make_model(client, name)
        version = client.create_model_version(
            name, source, run_id, tags=_fitting(tags), await_creation_for=0
        )
        return Registered(name, int(version.version))


def make_model(client: "MlflowClient", name: str) -> bool:
    """Makes a registered model; False where there is one of that name."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return False
    return True


def _fitting(tags: Mapping[str, str]) -> dict[str, str]:
    return split({fit_name(name): value for name, value in tags.items()})


def read_tags(home: Path, name: str, version: int) -> dict[str, str]:
    """The tags of a registered version, joined again where they had to be split.

    Raises:
        TrackingError: There is no such version, or MLflow cannot be reached.
    """
    with speaking(home, f"to show version {version} of {name!r}") as client:
        return join(client.get_model_version(name, str(version)).tags)


def registered_versions(home: Path) -> list[Version]:
    """Every version of every registered model, by name and then by number.

    Raises:
        TrackingError: MLflow cannot be reached.
    """
    own = f"sqlite:///{home.resolve() / 'mlflow.db'}"
    if tracking_uri(home) == own and not (home / "mlflow.db").exists():
        return []  # asking would make the database, which takes seconds
    with impatient(), speaking(home, "to list registered models") as client:
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


def experiment_id(client: "MlflowClient", home: Path, name: str) -> str:
    """The id of an experiment, made when missing (another process may make it first).

    Raises:
        TrackingError: It was deleted, or is there and may not be seen.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        own = is_database(tracking_uri(home))
        location = (home.resolve() / "mlartifacts").as_uri() if own else None
        try:
            return client.create_experiment(name, artifact_location=location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)
    if found is None:
        raise TrackingError(f"the MLflow experiment {name!r} exists, but this user may not see it")
    if found.lifecycle_stage == "deleted":
        raise TrackingError(
            f"the MLflow experiment {name!r} was deleted: `mlflow experiments restore "
            f"--experiment-id {found.experiment_id}` brings it back"
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
