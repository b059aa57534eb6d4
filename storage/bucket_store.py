"""A store that several machines share: a bucket, and a local store as the folder in front of it.

What a run reads is fetched whole, checked and published on this disk, so whatever others delete, a
run has what it found. What is made here is committed here first and put into the bucket at once.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from storage.artifact import Artifact
from storage.bucket import Bucket, Placed, unit_of
from storage.bucket_leases import BucketLeases
from storage.draft import Draft, Inputs
from storage.errors import ArtifactCorruptError, ArtifactMissingError, ObjectsError
from storage.leases import Claim
from storage.manifest import Manifest
from storage.store import Store
from storage.transfer import Transfer


class BucketStore(Store):
    """A store in a bucket.

    Args:
        root: the local folder; what is deleted from it is fetched again.
        bucket: what is shared.
        on_problem: told one line about each damaged artifact that was put aside.
        local_stages: stages whose artifacts stay on this disk.
        leases: those of the bucket; others for tests.

    Raises:
        ObjectsError: the bucket cannot be used.
        StorageError: as of `Store`.
    """

    REMEDY = "will be fetched or computed again"

    def __init__(
        self,
        root: Path,
        bucket: Bucket,
        on_problem: Callable[[str], None],
        local_stages: Collection[str] = (),
        leases: BucketLeases | None = None,
    ) -> None:
        super().__init__(root, on_problem)
        self.bucket = bucket
        self._leases = leases or BucketLeases(bucket.objects)
        self._transfer = Transfer(self.layout, bucket, on_problem)
        self._local_stages = frozenset(local_stages)
        # Key to stage and version, as they were when the store was opened, and what this process
        # did since: whether something has to be put there, and what `plan` says, is decided by it.
        self._there = {key: (stage, one.version) for (stage, key), one in bucket.listed().items()}
        self._index: dict[tuple[str, str], list[str]] | None = None

    @property
    def where(self) -> str:
        """The bucket's address."""
        return self.bucket.address

    def begin(self) -> None:
        """Refuse a bucket that cannot be written."""
        self.bucket.begin()

    def note_run(self, name: str, created: str, keys: Iterable[str], registry: str) -> None:
        """Tell other machines what a run used, so that none of them frees it."""
        fields = {"created": created, "keys": sorted(keys), "registry": registry}
        self.bucket.note(name, fields)

    def claim(self, stage: str, keys: Sequence[str]) -> Claim:
        """Take the leases of all these keys, or of none, among all who share the bucket.

        Arguments and errors as of `Store`.

        Raises:
            ObjectsError: the bucket cannot be used.
        """
        with ExitStack() as taken:
            taken.enter_context(super().claim(stage, keys))
            if stage not in self._local_stages:
                taken.enter_context(self._leases.claim(stage, keys))
            self.look_again(stage, keys)
            return Claim(taken.pop_all())

    def look_again(self, stage: str, keys: Sequence[str]) -> None:
        """See what others have put of these keys since the store was opened.

        Raises:
            ObjectsError: the bucket cannot be used.
        """
        if stage not in self._local_stages:
            unknown = sorted({key for key in keys if key not in self._there})
            found = self.bucket.versions(stage, unknown)
            self._there |= {key: (stage, version) for key, version in found.items()}

    @contextmanager
    def draft(
        self, *, key: str, stage: str, unit: str, recipe: Mapping[str, Any], inputs: Inputs
    ) -> Iterator[Draft]:
        """Open a draft; leaving the block commits it here and then in the bucket.

        Raises:
            StoreFullError: as of `Store`.
            ObjectsError: it is committed here and could not be put into the bucket.
        """
        with super().draft(key=key, stage=stage, unit=unit, recipe=recipe, inputs=inputs) as draft:
            yield draft
        draft.give_way(self._share(draft.manifest))

    def find(self, key: str, stage: str | None = None) -> Manifest | None:
        """Look an artifact up for use: here, else in the bucket, from which it is fetched.

        What is here and was not in the bucket is put there. Damage in the bucket is reported, and
        what is damaged deleted there.
        """
        found = super().find(key, stage)
        if found is not None:
            return self._share(found)
        known = stage or self._stage(key)
        if known is None or known in self._local_stages:
            return None
        return self._fetch(key, known)

    def peek(self, key: str, stage: str | None = None) -> Manifest | None:
        """Look an artifact up by its manifest; changes and reports nothing."""
        found = super().peek(key, stage)
        if found is None and key in self._there:
            placed = self._placed([key])
            found = placed[0].manifest if placed else None
        return found

    def open(self, key: str, stage: str | None = None) -> Artifact:
        """Open an artifact for reading, fetched if it is not here."""
        known = self._stage(key)
        if self._folder(key, stage) is None and known is not None:
            self._fetch(key, known)
        return super().open(key, stage)

    def check(self, manifest: Manifest) -> list[str]:
        """Read every byte of an artifact, here and in the bucket, and list what is wrong."""
        stage, key = manifest.stage, manifest.key
        here = self._folder(key, stage) is not None
        problems = super().check(manifest) if here else []
        if stage in self._local_stages:
            return problems
        try:
            placed = self.bucket.read(stage, key)
            found = [] if placed is None else self.bucket.problems(placed)
            if found and self.bucket.read(stage, key) != placed:
                found = []  # deleted or replaced meanwhile
        except ArtifactCorruptError as error:
            found = [str(error)]
        return problems + [f"{self.where}: {problem}" for problem in found]

    def strays(self) -> Iterator[Path | str]:
        """Yield what lies here or in the bucket and has no place in a store."""
        yield from super().strays()
        yield from self.bucket.strays()

    def stages(self) -> list[str]:
        """Names of the stages that it has artifacts of, sorted."""
        return sorted({*super().stages(), *(stage for stage, _ in self._there.values())})

    def manifests(self, stage: str | None = None) -> Iterator[Manifest]:
        """Yield the manifests of all artifacts (of a stage), here and then in the bucket alone."""
        here = set()
        for manifest in super().manifests(stage):
            here.add(manifest.key)
            yield manifest
        listed = self.bucket.listed(stage)
        wanted = {place: one.version for place, one in listed.items() if place[1] not in here}
        found = self.bucket.read_all(wanted)
        for (name, key), placed in found.items():
            if isinstance(placed, Placed):
                yield placed.manifest
            elif placed is not None:
                self._on_problem(f"{name} {key[:12]} in {self.where}: {placed}; left out")

    def candidates(self, stage: str, unit: str) -> list[Manifest]:
        """Return the artifacts of one unit of one stage, newest first."""
        found = super().candidates(stage, unit)
        if stage in self._local_stages:
            return found
        if self._index is None:
            self._index = self.bucket.index()
        here = {manifest.key for manifest in found}
        others = [key for key in self._index.get(unit_of(stage, unit), []) if key not in here]
        found += [one.manifest for one in self._placed(others) if one.manifest.unit == unit]
        return sorted(found, key=lambda manifest: (manifest.created, manifest.key), reverse=True)

    def remove(self, key: str, stage: str | None = None) -> None:
        """Delete an artifact here and in the bucket.

        Raises:
            ArtifactMissingError: there is none under this key in either.
        """
        known = self._stage(key)
        with nullcontext() if known is None else suppress(ArtifactMissingError):
            self.evict(key, stage)
        if known is not None:
            self.drop(key, known)

    def drop(self, key: str, stage: str) -> None:
        """Delete an artifact from the bucket, if it is there."""
        try:
            placed = self.bucket.read(stage, key)
        except ArtifactCorruptError:
            placed = None
        self.bucket.drop(stage, key, placed)
        self._there.pop(key, None)

    def _stage(self, key: str) -> str | None:
        """The stage of a key that the bucket has, as far as is known."""
        return self._there[key][0] if key in self._there else None

    def _beginning(self, prefix: str) -> list[tuple[str, str]]:
        there = self._there.items()
        others = {(stage, key) for key, (stage, _) in there if key.startswith(prefix)}
        return sorted({*super()._beginning(prefix), *others})

    def _known(self, key: str, stage: str | None = None) -> Manifest:
        found = self.peek(key, stage)
        return found if found is not None else super()._known(key, stage)

    def _placed(self, keys: Iterable[str]) -> list[Placed]:
        """What the bucket has of keys; nothing of what it has not, or has damaged."""
        there = ((key, *self._there[key]) for key in keys if key in self._there)
        found = self.bucket.read_all({(stage, key): version for key, stage, version in there})
        return [one for one in found.values() if isinstance(one, Placed)]

    def _share(self, manifest: Manifest) -> Manifest:
        """Put an artifact of this disk into the bucket, if it is not there; return as `send`."""
        stage, key = manifest.stage, manifest.key
        if stage in self._local_stages or key in self._there:
            return manifest
        try:
            manifest = self._transfer.send(manifest)
        except FileNotFoundError as error:
            raise ArtifactMissingError(
                f"{stage} {manifest.unit} ({key[:12]}) was removed while it was being put into "
                f"{self.where}"
            ) from error
        except ObjectsError as error:
            raise ObjectsError(
                f"{error}. What was computed is kept in {self.root}, and the same command again "
                "puts it there"
            ) from None
        self._there[key] = stage, ""
        return manifest

    def _fetch(self, key: str, stage: str) -> Manifest | None:
        """Bring an artifact from the bucket to this disk; None if there is no whole one."""
        found = self._transfer.fetch(key, stage)
        if found is None:
            self._there.pop(key, None)
        else:
            self._there[key] = stage, ""
        return found
