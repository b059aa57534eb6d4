"""What of the store nothing needs: no registered model, and no run of late."""

import math
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NoReturn

from compress_core.errors import ConfigError
from flows.runs.records import read_run_records
from storage.errors import StorageError
from storage.gc import GarbageReport, collect_garbage
from storage.manifest import Manifest
from storage.occupancy import alone
from storage.store import Store
from tasks.tracking import client as tracking
from tasks.tracking.speaking import registry_of

RECENT_DAYS = 14.0


def free_store(home: Path, store: Store, recent_days: float, *, dry_run: bool) -> GarbageReport:
    """Frees what no registered model and no recent run reaches.

    A run that was stopped has no record: what was made of late stays, so that it can go on.
    Of runs that registered their model in another registry than the one that is asked everything
    stays: nobody here knows whether it is a champion there.

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
        recent = keys_of_runs(home, since)
        recent |= {one.key for one in store.manifests() if _made(one) >= since}
        registered = tracking.registered_keys(home)  # beginnings of keys
        lengths = {len(beginning) for beginning in registered}
        roots = recent | {
            key
            for _, key, _ in store.layout.artifacts()
            if any(key[:length] in registered for length in lengths)
        }
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


def told(report: GarbageReport, *, dry_run: bool) -> str:
    """What was freed, in a line."""
    word = "would free" if dry_run else "freed"
    return (
        f"{word} {report.freed_bytes / 1e6:,.1f} MB: {len(report.removed)} artifacts, "
        f"{len(report.orphans)} leftovers of runs that ended early; {report.kept} artifacts stay"
    )
