"""Free what nothing reaches in a bucket and in the folder in front of it, by the rules of `gc`.

Runs of other machines may be at work, and no lock tells. What they have found they have on their
own disks, and put back what they miss there, so nothing breaks that is freed too early; what is
young stays all the same, be it whole or on its way.
"""

from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from storage.bucket import LEASES, Placed
from storage.bucket_store import BucketStore
from storage.errors import ArtifactCorruptError
from storage.gc import SECONDS_UNTIL_ORPHAN, GarbageReport, collect_garbage, reachable
from storage.objects import Object
from storage.store import Store


def collect_shared_garbage(
    store: BucketStore,
    roots: Iterable[str],
    dry_run: bool,
    young: timedelta = timedelta(seconds=SECONDS_UNTIL_ORPHAN),
) -> GarbageReport:
    """Delete every artifact, here and in the bucket, that is not reachable from `roots`.

    Args:
        store: the store; on this disk nobody else may work with it meanwhile.
        roots: keys to keep, with all they were made from.
        dry_run: report only.
        young: what was put into the bucket less than this ago stays there.

    Returns:
        What was freed on this disk, with what was freed in the bucket.
    """
    bucket = store.bucket
    # before the manifests: a payload that is listed and named by none then was given up
    payloads = {one.name: one for one in bucket.payloads()}
    listed = bucket.listed()
    found = bucket.read_all({place: one.version for place, one in listed.items()})
    placed = {place: one for place, one in found.items() if isinstance(one, Placed)}
    manifests = {key: one.manifest for (_, key), one in placed.items()}
    manifests |= {one.key: one for one in Store.manifests(store)}  # of this disk
    live = reachable(manifests, roots)
    here = collect_garbage(store, live, dry_run)

    moment = datetime.now(UTC) - young

    def old(entry: Object) -> bool:
        return entry.modified <= moment

    dead = [p for p in placed if p[1] not in live and old(listed[p])]
    damaged = [
        p for p, one in found.items() if isinstance(one, ArtifactCorruptError) and old(listed[p])
    ]
    named = {one.payload for one in placed.values()}
    left = [name for name, one in payloads.items() if name not in named and old(one)]
    if not dry_run:
        for stage, key in dead:
            if bucket.read(stage, key) == placed[stage, key]:  # else put anew this moment
                store.drop(key, stage)
        over = [one.name for one in bucket.objects.list(LEASES) if old(one)]  # none renews them
        bucket.objects.delete([*(listed[place].name for place in damaged), *left, *over])
    there = GarbageReport(
        removed=[placed[place].manifest for place in dead],
        orphans=[*(listed[place].name for place in damaged), *left],
        freed_bytes=sum(payloads[n].size for n in left)
        + sum(placed[place].manifest.nbytes for place in dead),
        kept=len(placed) - len(dead),
    )
    return replace(here, there=there)
