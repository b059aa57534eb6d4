"""Artifacts on their way between a local store and a bucket, whole or not at all."""

from collections.abc import Callable

from storage import disk, verify
from storage.bucket import Bucket, Placed
from storage.draft import move_out, publish, write_manifest
from storage.errors import ArtifactCorruptError, ArtifactMissingError, StorageError
from storage.layout import Layout
from storage.manifest import FILES_FOLDER, MANIFEST_NAME, Manifest


class Transfer:
    """Both ways.

    Args:
        layout: of the local store.
        bucket: what is shared.
        on_problem: told one line about each artifact that is damaged in the bucket.
    """

    def __init__(self, layout: Layout, bucket: Bucket, on_problem: Callable[[str], None]) -> None:
        self._layout = layout
        self._bucket = bucket
        self._on_problem = on_problem

    def send(self, manifest: Manifest) -> Manifest:
        """Put an artifact into the bucket.

        Returns:
            What this disk has then: of an artifact that somebody else put first, with other
            content, theirs.

        Raises:
            FileNotFoundError: it was removed here meanwhile.
            ObjectsError: the bucket cannot be used.
        """
        stage, key = manifest.stage, manifest.key
        folder = self._layout.artifact(stage, key)
        text = (folder / MANIFEST_NAME).read_text()
        while True:
            winner = None
            try:
                # the work took its time: others may be done, and then no byte has to be sent
                winner = self._bucket.read(stage, key) or self._bucket.send(manifest, text, folder)
                if winner.manifest.digest == manifest.digest:
                    return manifest
                return self._download(winner, replace=True)
            except ArtifactCorruptError as error:
                self._damaged(stage, key, f"{error}; replaced", winner)
            except ArtifactMissingError:  # theirs was deleted this moment
                continue

    def fetch(self, key: str, stage: str) -> Manifest | None:
        """Bring an artifact from the bucket to this disk; None if there is no whole one."""
        placed = None
        try:
            placed = self._bucket.read(stage, key)
            if placed is not None:
                return self._download(placed)
        except ArtifactMissingError:  # deleted this moment
            pass
        except ArtifactCorruptError as error:
            self._damaged(stage, key, f"{error}; will be computed again", placed)
        return None

    def _download(self, placed: Placed, replace: bool = False) -> Manifest:
        """Publish an artifact of the bucket here, once every byte is checked.

        Args:
            placed: what the bucket has.
            replace: put it in the place of what is here.

        Raises:
            ArtifactCorruptError: it is damaged in the bucket.
            ArtifactMissingError: it was deleted there meanwhile.
            StorageError: it cannot be written here.
        """
        manifest = placed.manifest
        scratch = self._layout.scratch(manifest.key)
        target = self._layout.artifact(manifest.stage, manifest.key)
        try:
            with disk.writing(scratch, manifest.nbytes):
                disk.make_folder(scratch / FILES_FOLDER)
                whole = self._bucket.fetch(placed, scratch)
                seen = verify.signature(scratch, manifest)
                if not whole or seen is None or verify.deep_problems(scratch, manifest):
                    raise self._judge(placed)
                paths = [scratch / name for name in sorted(manifest.files)]
                write_manifest(scratch, placed.text, paths)
                if replace:
                    move_out(self._layout, target)
                found = publish(self._layout, scratch, manifest)
        finally:
            disk.remove_tree(scratch)
        if found is manifest:
            verify.TRUST.grant(target, manifest, seen)
        return found

    def _judge(self, placed: Placed) -> StorageError:
        """Whose fault it is that an artifact did not arrive whole; the bucket is read once more.

        What all share is deleted on no other evidence than its own bytes.
        """
        what = f"{placed.manifest.stage} {placed.manifest.key[:12]}"
        problems = self._bucket.problems(placed)
        if not problems:
            return StorageError(
                f"{what} is whole in {self._bucket.address} and damaged once it is written below "
                f"{self._layout.root}: check that disk, and run the same command again"
            )
        if self._bucket.read(placed.manifest.stage, placed.manifest.key) != placed:
            return ArtifactMissingError(f"{what} was deleted from {self._bucket.address} meanwhile")
        return ArtifactCorruptError(problems[0])

    def _damaged(self, stage: str, key: str, what: str, placed: Placed | None) -> None:
        """Report an artifact that is damaged in the bucket, and take it away there."""
        self._on_problem(f"{stage} {key[:12]} in {self._bucket.address}: {what}")
        self._bucket.drop(stage, key, placed)
