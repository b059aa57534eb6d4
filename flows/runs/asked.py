"""Which runs a report is about: a word or a path of the user's, and the records that it names."""

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress_core.errors import ConfigError
from compress_core.options import nearest
from flows.report.files import portable
from flows.runs.records import RunRecord, read_run, read_run_records
from tasks.tracking.client import registered_versions
from tasks.tracking.versions import find_version

RESULTS = "results.json"
SHORTEST = 4  # letters of the beginning of a name


@dataclass(frozen=True)
class Asked:
    """The runs of one report.

    Attributes:
        name: Of the report: a run's record, a sweep, or a report's folder.
        runs: What is on record of each: "result", and "created" and "config" where its record is
            there still.
        sweep: Whether they are a sweep's.
    """

    name: str
    runs: list[dict[str, Any]]
    sweep: bool


def find_asked(home: Path, asked: str | None, tell: Callable[[str], None]) -> Asked:
    """The runs that a word names: the newest run or sweep where there is none.

    Args:
        home: Data directory.
        asked: A run's or a sweep's name, the id of a run in MLflow, or the beginning of one; a
            registered model, NAME, NAME/VERSION or NAME@ALIAS; a model folder; the folder of a
            sweep's report, by its path or its name in the data directory, or its results.json.
        tell: Told of records that are damaged, which are none of those that can be asked for.

    Raises:
        ConfigError: Nothing has that name; it names the nearest.
        StorageError: A record that is asked for cannot be read.
    """
    every = read_run_records(home, lambda error: tell(str(error)))
    records = [record for record in every if record.model]
    if asked is None:
        if not records:
            raise ConfigError(f"there is no run on record in {home}; choose another with --home")
        return _of_record(home, records, records[-1])
    place = _existing(asked)
    if place is not None:
        return _of_path(home, records, place)
    if asked.startswith((".", "~", os.sep)):
        raise ConfigError(f"there is no {asked}; name a model folder or a sweep's report")
    if (found := _by_name(home, records, asked)) is not None:
        return found
    models = list(dict.fromkeys(version.name for version in registered_versions(home)))
    if re.split("[@/]", asked)[0] in models:
        return _of_version(home, records, asked)
    folder = _existing(str(home / "reports" / asked / RESULTS)) if asked else None
    if folder is not None:
        return _of_path(home, records, folder)
    raise ConfigError(_unknown(home, records, models, asked))


def _existing(asked: str) -> Path | None:
    """The file or folder of that path; None where there is none or it can be none."""
    try:
        place = Path(asked).expanduser()
        return place if asked and place.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long a name, no such user, a zero byte
        return None


def _of_record(home: Path, records: Sequence[RunRecord], record: RunRecord) -> Asked:
    """The run of a record, or the whole sweep that it is part of."""
    if not record.sweep:
        return Asked(record.name, [read_run(home, record.name)], False)
    names = [other.name for other in records if other.sweep == record.sweep]
    return Asked(record.sweep, [read_run(home, name) for name in names], True)


def _by_name(home: Path, records: Sequence[RunRecord], asked: str) -> Asked | None:
    """The one run or sweep whose name or id begins so; a run of a sweep by its own name alone."""
    runs = {
        record.name: record
        for record in records
        if any(_begins(name, asked) for name in (record.name, record.run_id))
    }
    sweeps = {record.sweep: record for record in records if _begins(record.sweep, asked)}
    if len(runs) + len(sweeps) > 1:
        raise ConfigError(f"{asked!r} begins several names: {', '.join([*sweeps, *runs][:6])}")
    for record in sweeps.values():
        return _of_record(home, records, record)
    for name in runs:
        return Asked(name, [read_run(home, name)], False)
    return None


def _begins(name: str, asked: str) -> bool:
    return bool(asked) and (name == asked or (len(asked) >= SHORTEST and name.startswith(asked)))


def _of_path(home: Path, records: Sequence[RunRecord], place: Path) -> Asked:
    """A model folder's run, or a sweep by its report."""
    folder = (place.parent if place.name == RESULTS else place).resolve()
    if (folder / RESULTS).is_file():
        return _of_results(home, records, folder)
    for record in reversed(records):
        if record.model_dir and Path(record.model_dir).resolve() == folder:
            return Asked(record.name, [read_run(home, record.name)], False)
    raise ConfigError(
        f"{place} is neither the model folder of a run in {home} nor a sweep's report with a "
        f"{RESULTS}"
    )


def _of_results(home: Path, records: Sequence[RunRecord], folder: Path) -> Asked:
    """What a ``results.json`` says, each run with its record where that says the same.

    Raises:
        ConfigError: It holds no results.
    """
    file = folder / RESULTS
    try:
        results = json.loads(file.read_bytes())
        wanted = {(run["model"], f"{run['method']} kept {run['kept']:g}") for run in results}
        whole = [(run["metrics"]["dense"]["texts"], run["parameters"]) for run in results]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} does not hold the results of a sweep: {error}") from None
    if not whole:
        raise ConfigError(f"{file} holds no results")
    known: list[dict[str, Any]] = [
        read_run(home, record.name)
        for record in reversed(records)
        if (record.model, record.what) in wanted
    ]
    runs = []
    for result in results:
        same = (run for run in known if portable(run["result"]) == portable(result))
        runs.append(next(same, {"result": result}))
    return Asked(folder.name, runs, True)


def _of_version(home: Path, records: Sequence[RunRecord], asked: str) -> Asked:
    """The run that made a registered version.

    Raises:
        ConfigError: There is no record of its run.
        TrackingError: The model has no such version or alias, or MLflow cannot be reached.
    """
    version = find_version(home, asked)
    for record in reversed(records):
        if record.run_id == version.run_id:
            return Asked(record.name, [read_run(home, record.name)], False)
    raise ConfigError(
        f"the record of the run that made {version.name} version {version.version} is not in {home}"
    )


def _unknown(home: Path, records: Sequence[RunRecord], models: Sequence[str], asked: str) -> str:
    reports = [file.parent.name for file in sorted((home / "reports").glob(f"*/{RESULTS}"))]
    newest = [record.sweep or record.name for record in reversed(records)]
    known = list(dict.fromkeys([*newest, *reports, *models]))
    there = f"; there are {', '.join(known[:6])}" if known else "; there is none at all"
    hint = nearest(asked, known) or there
    return f"there is no run, sweep or model called {asked!r} in {home}{hint}"
