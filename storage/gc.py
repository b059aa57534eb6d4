"""Free what nothing reaches: artifacts no root was made from, and drafts of dead processes."""

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from storage.disk import freed_by, size_below
from storage.draft import move_out
from storage.errors import ArtifactCorruptError, ArtifactMissingError
from storage.hosts import runs
from storage.layout import Layout
from storage.leases import clear
from storage.manifest import Manifest, read_manifest
from storage.store import Store

SECONDS_UNTIL_ORPHAN = 24 * 3600.0


@dataclass(frozen=True)
class GarbageReport:
    """What a collection freed, or would free.

    Attributes:
        removed: manifests of the unreachable artifacts.
        orphans: folders, or names in a bucket, without a complete artifact: abandoned drafts,
            damaged manifests.
        freed_bytes: what both together give back; not what a published folder is linked to.
        kept: number of artifacts that stay.
        there: the same of the bucket behind this disk, if there is one.
    """

    removed: list[Manifest]
    orphans: Sequence[Path | str]
    freed_bytes: int
    kept: int
    there: "GarbageReport | None" = None


def collect_garbage(
    store: Store, roots: Iterable[str], dry_run: bool, keep_tmp_of_live_processes: bool = True
) -> GarbageReport:
    """Delete every artifact that is not reachable from `roots` over the inputs of its manifests.

    Nobody else may work with the store meanwhile, nor while the roots are gathered
    (`storage.occupancy.alone`): what a run in progress has made is reached from nowhere yet.

    Args:
        store: the store.
        roots: keys to keep, with all they were made from; those not in the store are ignored.
        dry_run: report only.
        keep_tmp_of_live_processes: leave the young drafts of processes that still run.
    """
    manifests: dict[str, Manifest] = {}
    orphans = _abandoned_drafts(store.layout, keep_tmp_of_live_processes)
    for _, key, folder in store.layout.artifacts():
        try:
            manifests[key] = read_manifest(folder)
        except (FileNotFoundError, ArtifactCorruptError):
            if folder.is_dir():  # else removed by another process this moment
                orphans.append(folder)
    live = reachable(manifests, roots)
    removed = [manifest for key, manifest in manifests.items() if key not in live]
    freed = sum(size_below(path) for path in orphans)
    for manifest in removed:
        folder = store.layout.artifact(manifest.stage, manifest.key)
        freed += freed_by(folder / name for name in manifest.files)
    if not dry_run:
        for manifest in removed:
            with suppress(ArtifactMissingError):  # another process was faster
                store.evict(manifest.key, manifest.stage)
        for folder in orphans:
            move_out(store.layout, folder)
        clear(store.layout)
    return GarbageReport(removed, orphans, freed, len(manifests) - len(removed))


def reachable(manifests: Mapping[str, Manifest], roots: Iterable[str]) -> set[str]:
    """Return the keys that are roots or that roots were made from, of those there are."""
    live: set[str] = set()
    ahead = [key for key in roots if key in manifests]
    while ahead:
        key = ahead.pop()
        if key not in live:
            live.add(key)
            ahead.extend(above for above in manifests[key].input_keys if above in manifests)
    return live


def _abandoned_drafts(layout: Layout, keep_live: bool) -> list[Path]:
    oldest_alive = time.time() - SECONDS_UNTIL_ORPHAN
    return [
        folder
        for folder in sorted(layout.tmp.iterdir())
        if not (keep_live and _may_be_at_work(folder) and _last_change(folder) > oldest_alive)
    ]


def _may_be_at_work(folder: Path) -> bool:
    """Tell whether the process in a draft's name is there; of another name only its age counts."""
    parts = folder.name.split("-")
    return not (len(parts) == 3 and parts[1].isdecimal()) or runs(int(parts[1]))


def _last_change(folder: Path) -> float:
    """Return when anything in a draft was last written, in seconds since 1970."""
    latest = 0.0
    for parent, _, names in os.walk(folder):
        for path in (parent, *(os.path.join(parent, name) for name in names)):
            try:
                latest = max(latest, os.lstat(path).st_mtime)
            except (FileNotFoundError, NotADirectoryError):  # its process is just removing it
                continue
    return latest
