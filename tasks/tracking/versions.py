"""One registered version: found by what people call it, with its files and its run's metrics."""

import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import mkdtemp
from time import time
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from tasks.tracking.client import Version, registered_versions
from tasks.tracking.files import FILES_TAG, compare_files
from tasks.tracking.limits import METRICS_PER_CALL, fit_name, is_number, pieces
from tasks.tracking.speaking import TrackingError, impatient, speaking, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

DOWNLOADS = "versions"  # in the data directory: what was fetched from a tracking server, once
NAMED = 8  # of the names, aliases or versions that there are
LONGEST = 150  # bytes of a name in that of a folder


def find_version(home: Path, asked: str) -> Version:
    """The version that is meant by ``NAME`` (its newest), ``NAME@ALIAS`` or ``NAME/NUMBER``.

    Args:
        home: The data directory.
        asked: What somebody wrote.

    Raises:
        TrackingError: There is none, with what there is instead; or MLflow cannot be reached.
    """
    everything = registered_versions(home)
    known = dict.fromkeys(one.name for one in everything)
    name, sign, which = (asked, "", "") if asked in known else _parts(asked)
    versions = [one for one in everything if one.name == name]
    if not versions:
        there = f"there are {_some(known)}" if known else "none is registered yet"
        raise TrackingError(f"no registered model is called {name!r}; {there}")
    if sign == "@":
        aliases = read_aliases(home, name)
        if which not in aliases:
            there = f"its aliases are {_some(aliases)}" if aliases else "it has no alias"
            raise TrackingError(f"{name!r} has no alias {which!r}; {there}")
        number = aliases[which]
    else:
        number = int(which) if sign else versions[-1].version
    for one in versions:
        if one.version == number:
            return one
    numbers = [str(one.version) for one in reversed(versions)]
    raise TrackingError(f"{name!r} has no version {number}; it has {_some(numbers)}")


def read_aliases(home: Path, name: str) -> dict[str, int]:
    """Alias to number of the version, of a registered model.

    Raises:
        TrackingError: There is no such model, or MLflow cannot be reached.
    """
    with impatient(), speaking(home, f"to show the aliases of {name!r}") as client:
        aliases = client.get_registered_model(name).aliases
        return {alias: int(version) for alias, version in sorted(aliases.items())}


def model_folder(home: Path, version: Version) -> Path:
    """The local folder of a version's files.

    A folder that was registered where it lies is that folder. Files on a tracking server are
    downloaded once, into the data directory.

    Raises:
        TrackingError: The folder is gone, or the files cannot be downloaded.
    """
    what = f"{version.name} version {version.version}"
    place = urlsplit(version.source)
    if place.scheme in ("file", ""):
        folder = Path(unquote(place.path))
        if not folder.is_dir():
            raise TrackingError(
                f"the files of {what} are gone: there is no folder {folder}; the command that made "
                "it writes and registers it again"
            )
        return folder
    folder = home / DOWNLOADS / _folder_name(home, version)
    if not folder.is_dir():
        _download(home, version, folder)
    return folder


def check_files(folder: Path, version: Version) -> bool:
    """Makes sure that a folder still holds what was registered: nothing gone, changed or added.

    Returns:
        Whether that could be told: versions from before digests were recorded have none.

    Raises:
        TrackingError: It does not, with the files that are not as they were.
    """
    recorded = version.tags.get(FILES_TAG)
    if recorded is None:
        return False
    compare_files(folder, recorded, f"{version.name} version {version.version}")
    return True


def run_metrics(home: Path, version: Version) -> dict[str, float]:
    """The metrics of the run that made a version, each its last value.

    Raises:
        TrackingError: No run made it, the run is gone, or MLflow cannot be reached.
    """
    with impatient(), speaking(home, f"to show the run of {version.name!r}") as client:
        return dict(client.get_run(_run_id(version)).data.metrics)


def log_metrics(home: Path, version: Version, metrics: Mapping[str, float]) -> None:
    """Adds metrics to the run that made a version; one that is there already gets a newer value.

    Raises:
        TrackingError: As :func:`run_metrics`; or a value is no number.
    """
    wrong = [name for name, value in metrics.items() if not is_number(value)]
    if wrong:
        raise TrackingError(f"metric {wrong[0]} is no number: {metrics[wrong[0]]!r}")
    with speaking(home, f"to add metrics to the run of {version.name!r}") as client:
        from mlflow.entities import Metric

        now = int(time() * 1000)
        numbers = [Metric(fit_name(name), float(v), now, 0) for name, v in metrics.items()]
        for some in pieces(numbers, METRICS_PER_CALL):
            client.log_batch(_run_id(version), metrics=some)


def _parts(asked: str) -> tuple[str, str, str]:
    """Name, sign ("@", "/" or nothing) and what stands behind it."""
    for sign in "@/":
        name, found, which = asked.rpartition(sign)
        if found and name and which and (sign == "@" or which.isdecimal()):
            return name, sign, which
    if not asked or set(asked) & set("@/:"):
        raise TrackingError(
            f"{asked!r} is no registered version: write NAME, NAME@ALIAS or NAME/NUMBER"
        )
    return asked, "", ""


def _some(names: Iterable[str]) -> str:
    known = list(names)
    more = f" and {len(known) - NAMED} more" if len(known) > NAMED else ""
    return ", ".join(known[:NAMED]) + more


def _run_id(version: Version) -> str:
    if not version.run_id:
        raise TrackingError(f"{version.name} version {version.version} belongs to no run")
    return version.run_id


def _folder_name(home: Path, version: Version) -> str:
    """One per version of a server: the same name may be another model's on another one."""
    where = f"{tracking_uri(home)} {version.name} {version.version} {version.source}"
    said = version.name.encode()[:LONGEST].decode(errors="ignore")
    return f"{said}-{version.version}-{hashlib.sha256(where.encode()).hexdigest()[:8]}"


def _download(home: Path, version: Version, folder: Path) -> None:
    """All or nothing: what another process or an interruption leaves is never half a model."""
    what = f"{version.name} version {version.version}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise TrackingError(
            f"cannot download {what} to {folder}: {error.strerror or error}"
        ) from error
    try:
        with speaking(home, f"to download the files of {what}") as client:
            found = _fetch(client, home, version, draft)
        try:
            found.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    except OSError as error:
        raise TrackingError(
            f"cannot download {what} to {folder}: {error.strerror or error}"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _fetch(client: "MlflowClient", home: Path, version: Version, draft: Path) -> Path:
    from mlflow.artifacts import download_artifacts

    source = client.get_model_version_download_uri(version.name, str(version.version))
    uri = tracking_uri(home)
    registry = os.environ.get("MLFLOW_REGISTRY_URI") or uri
    return Path(
        download_artifacts(source, dst_path=str(draft), tracking_uri=uri, registry_uri=registry)
    )
