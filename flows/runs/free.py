"""What of the store nothing needs: no registered model, and no run of late."""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn

from compress_core.errors import ConfigError
from flows.runs.records import read_run_records
from flows.settings.home import RUNS
from storage.bucket_gc import collect_shared_garbage
from storage.bucket_store import BucketStore
from storage.errors import StorageError
from storage.gc import GarbageReport, collect_garbage
from storage.manifest import Manifest
from storage.occupancy import alone
from storage.store import Store
from tasks.tracking import client as tracking
from tasks.tracking.speaking import is_server, registry_of


def free_store(home: Path, store: Store, recent_days: float, *, dry_run: bool) -> GarbageReport:
    """Frees what no registered model and no recent run reaches.

    A run that was stopped has no record: what was made of late stays, so that it can go on.
    Of runs that registered their model in another registry than the one that is asked everything
    stays: nobody here knows whether it is a champion there. The same holds for what other machines
    noted of their runs in a bucket.

    Args:
        home: The data directory.
        store: Its store.
        recent_days: Runs newer than this keep what they made, finished or not.
        dry_run: Whether nothing is removed.

    Raises:
        ConfigError: The days are no number of days.
        StorageError: A record of a run is damaged, so nobody knows what it needs, or a run works
            with the store.
        TrackingError: MLflow cannot be reached.
    """
    if not (math.isfinite(recent_days) and recent_days >= 0):
        raise ConfigError(f"--recent-days is a number of days, 0 or more, got {recent_days:g}")
    with nullcontext() if dry_run else alone(store.root):
        since = _days_ago(recent_days)
        known = list(store.manifests())
        recent = keys_of_runs(home, since)
        recent |= {one.key for one in known if _made(one) >= since}
        registered = tracking.registered_keys(home)  # beginnings of keys
        lengths = {len(beginning) for beginning in registered}
        roots = recent | {
            one.key for one in known if any(one.key[:length] in registered for length in lengths)
        }
        if isinstance(store, BucketStore):
            roots |= keys_of_others(home, store.bucket.notes(), since)
            return collect_shared_garbage(store, roots, dry_run)
        return collect_garbage(store, roots, dry_run=dry_run)


def _days_ago(days: float) -> datetime:
    now = datetime.now(UTC)
    most = (now - datetime.min.replace(tzinfo=UTC)).days
    return now - timedelta(days=min(days, most))


def _made(manifest: Manifest) -> datetime:
    return datetime.fromisoformat(manifest.created)


def keys_of_runs(home: Path, since: datetime) -> set[str]:
    """Keys of everything that runs used which ended since then, or registered elsewhere.

    Raises:
        StorageError: A record is damaged, so that nobody knows what its run used.
    """

    def refuse(error: StorageError) -> NoReturn:
        raise StorageError(f"nothing was freed: {error}")

    here = (None, registry_of(home))
    return {
        key
        for record in read_run_records(home, refuse)
        if record.created >= since or record.registry not in here
        for key in record.keys
    }


def keys_of_others(home: Path, notes: Mapping[str, Mapping[str, Any]], since: datetime) -> set[str]:
    """Keys of what runs of other machines used, by what they noted in the bucket.

    An old run's are not needed where it registered its model with the server that is asked here.

    Args:
        home: The data directory; of its own runs the records decide.
        notes: Name of a run to what it noted.
        since: From when on a run is recent.

    Raises:
        StorageError: A note is not understood, so that nobody knows what its run used.
    """
    own = {file.stem for file in (home / RUNS).glob("*.json")}
    here = registry_of(home)
    needed: set[str] = set()
    for name, note in notes.items():
        if name in own:
            continue
        try:
            asked_here = is_server(here) and note["registry"] == here
            if not asked_here or datetime.fromisoformat(note["created"]) >= since:
                needed.update(note["keys"])
        except (KeyError, TypeError, ValueError) as error:
            raise StorageError(
                f"nothing was freed: the note of the run {name} in the bucket is not understood "
                f"({error}); delete it if that run needs nothing any more"
            ) from error
    return needed


def told(report: GarbageReport, *, dry_run: bool) -> str:
    """What was freed, in a line."""
    word = "would free" if dry_run else "freed"
    shared = f"in the bucket {_told(report.there)}; here " if report.there else ""
    return f"{word} {shared}{_told(report)}"


def _told(report: GarbageReport) -> str:
    return (
        f"{report.freed_bytes / 1e6:,.1f} MB: {len(report.removed)} artifacts, "
        f"{len(report.orphans)} leftovers of runs that ended early; {report.kept} artifacts stay"
    )


def as_fields(report: GarbageReport) -> dict[str, Any]:
    """The same in numbers; "bucket" has those of the bucket, where there is one."""
    return {
        "freed_bytes": report.freed_bytes,
        "removed": len(report.removed),
        "kept": report.kept,
        **({"bucket": as_fields(report.there)} if report.there else {}),
    }
