"""The content-addressed store: find an artifact by its key, read it, write it, explain it.

An artifact lies in `<root>/<stage>/<key[:2]>/<key>/` as `manifest.json`, `arrays/` (a Zarr v3
group) and `files/`. It appears by one rename and never changes afterwards.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from storage import disk, verify
from storage.artifact import Artifact, Identity, folder_identity
from storage.draft import Draft, Inputs, move_out
from storage.errors import ArtifactCorruptError, ArtifactMissingError, StorageError
from storage.index import drop_from_index, keys_in_index, rebuild_index
from storage.layout import INDEX, Layout, check_key, check_stage
from storage.leases import Claim, claim_files
from storage.lookup import Lookup
from storage.manifest import MANIFEST_NAME, Manifest, read_manifest
from storage.root import FORMAT_NAME, prepare_root

_LOG = logging.getLogger(__name__)


class Store(Lookup):
    """A store on a local disk.

    Args:
        root: its folder; made if absent.
        on_problem: told one line about each damaged artifact that was put aside.

    Raises:
        StoreVersionError: a newer version of the program wrote it.
        StorePermissionError: it cannot be written.
        StoreFullError: the disk is full.
        StorageError: `root` is a file, or its format file is damaged.
    """

    REMEDY = "will be computed again"

    def __init__(self, root: Path, on_problem: Callable[[str], None] = _LOG.warning) -> None:
        self.root = Path(root).absolute()
        self._layout = Layout(self.root)
        self._on_problem = on_problem
        prepare_root(self._layout)
        if not (self.root / INDEX).is_dir():
            self.rebuild_index()

    @property
    def layout(self) -> Layout:
        """The paths of this store."""
        return self._layout

    @property
    def where(self) -> str:
        """What people call the place."""
        return str(self.root)

    def begin(self) -> None:
        """Refuse what a run could not keep its results in; this disk was asked already."""

    def note_run(self, name: str, created: str, keys: Iterable[str], registry: str) -> None:
        """Tell whoever else frees from this store what a run used; nobody does without its records.

        Args:
            name: of the run's record.
            created: when it ended, ISO 8601 with a zone.
            keys: of the artifacts that it used.
            registry: where its model was registered.
        """

    def stages(self) -> list[str]:
        """Names of the stages that it has artifacts of, sorted."""
        return self._layout.stages()

    def claim(self, stage: str, keys: Sequence[str]) -> Claim:
        """Take the leases of all these keys, or of none; nobody is waited for.

        Behind it `find` of them sees whatever anyone has put before.

        Args:
            stage: their stage.
            keys: what is about to be computed.

        Raises:
            LeaseHeldError: another process, or another claim of this one, holds one of them.
            StorageError: the leases cannot be written.
        """
        return claim_files(self._layout, check_stage(stage), [check_key(key) for key in keys])

    def look_again(self, stage: str, keys: Sequence[str]) -> None:
        """See what others have put of these keys since the store was opened; a disk shows it."""

    @contextmanager
    def draft(
        self, *, key: str, stage: str, unit: str, recipe: Mapping[str, Any], inputs: Inputs
    ) -> Iterator[Draft]:
        """Open a draft; leaving the block commits it, an exception in the block removes it.

        Args:
            key: `recipe_key(recipe)`.
            stage: name of the stage; lower-case.
            unit: label of what the artifact is about.
            recipe: everything that decides the numbers, plain data.
            inputs: role -> {"key": key in this store or None, "digest": digest of the content}.

        Raises:
            StoreFullError: the disk filled up anywhere in the block or the commit.
        """
        draft = Draft(self._layout, key, stage, unit, recipe, inputs)
        try:
            draft.open()
            yield draft
            draft.commit()
        except BaseException as error:
            needed = draft.bytes_needed()
            draft.discard()
            if isinstance(error, StorageError):
                raise
            if disk.is_disk_full(error):
                raise disk.full_error(draft.what, self.root, needed) from error
            if isinstance(error, OSError) and self._holds(error.filename):
                raise disk.write_error(Path(str(error.filename)), error, needed) from error
            raise

    def find(self, key: str, stage: str | None = None) -> Manifest | None:
        """Look an artifact up for use.

        Every byte is checked the first time in a process, and again when a file was touched since.
        A damaged artifact is reported, put aside and counts as absent.

        Args:
            key: the key.
            stage: its stage, if known; saves a look into every stage's folder.
        """
        folder = self._folder(key, stage)
        if folder is None:
            return None
        identity = folder_identity(folder)
        manifest, seen = None, None
        try:
            manifest = self._read(folder)
            if verify.TRUST.holds(folder, manifest):
                return manifest
            seen = verify.signature(folder, manifest)
            problems = verify.deep_problems(folder, manifest)
        except FileNotFoundError as error:
            problems = [f"{Path(str(error.filename)).name} is missing"]
        except ArtifactCorruptError as error:
            problems = [str(error)]
        if manifest is not None and seen is not None and not problems:
            verify.TRUST.grant(folder, manifest, seen)
            return manifest
        if self._is_still(folder, identity):  # else removed or replaced this moment
            self._put_aside(folder, manifest, problems)
        return None

    def peek(self, key: str, stage: str | None = None) -> Manifest | None:
        """Look an artifact up by manifest, existence and sizes; changes and reports nothing."""
        folder = self._folder(key, stage)
        if folder is None:
            return None
        try:
            manifest = self._read(folder)
        except (FileNotFoundError, ArtifactCorruptError):
            return None
        return None if verify.shallow_problems(folder, manifest) else manifest

    def open(self, key: str, stage: str | None = None) -> Artifact:
        """Open an artifact for reading; `find` is what verifies it.

        Raises:
            ArtifactMissingError: there is none under this key.
            ArtifactCorruptError: its manifest is damaged.
        """
        folder = self._folder(key, stage)
        identity = None if folder is None else folder_identity(folder)
        if folder is None or identity is None:
            raise ArtifactMissingError(
                f"no {stage or 'artifact'} with key {key[:12]} in {self.root}"
            )
        try:
            return Artifact(folder, self._read(folder), identity)
        except FileNotFoundError as error:
            raise ArtifactMissingError(
                f"{folder} has no manifest: it is not an artifact"
            ) from error

    def check(self, manifest: Manifest) -> list[str]:
        """Read every byte of an artifact and list what is wrong with it; empty if nothing is.

        Nothing is wrong with one that another process removes or replaces meanwhile.
        """
        folder = self._layout.artifact(manifest.stage, manifest.key)
        identity = folder_identity(folder)
        try:
            if self._read(folder) != manifest:
                return ["the artifact was replaced by another one"]
            problems = verify.deep_problems(folder, manifest)
            problems += [
                f"{name} is not in its manifest" for name in verify.strays(folder, manifest)
            ]
        except FileNotFoundError as error:
            problems = [f"{Path(str(error.filename)).name} is missing"]
        except ArtifactCorruptError as error:
            problems = [str(error)]
        return problems if self._is_still(folder, identity) else []

    def strays(self) -> Iterator[Path | str]:
        """Yield what lies in the store's folders and is neither an artifact nor its own."""
        own = {self.root / FORMAT_NAME}
        return (path for path in self._layout.strays() if path not in own)

    def manifests(self, stage: str | None = None) -> Iterator[Manifest]:
        """Yield the manifests of all artifacts (of a stage); report and skip unreadable ones."""
        for name, key, folder in self._layout.artifacts(stage and check_stage(stage)):
            identity = folder_identity(folder)
            try:
                yield self._read(folder)
            except FileNotFoundError:
                if self._is_still(folder, identity):
                    self._on_problem(f"{name} {key[:12]}: {MANIFEST_NAME} is missing; left out")
            except ArtifactCorruptError as error:
                self._on_problem(f"{name} {key[:12]}: {error}; left out")

    def candidates(self, stage: str, unit: str) -> list[Manifest]:
        """Return the artifacts of one unit of one stage, newest first."""
        found = []
        for key in keys_in_index(self._layout, stage, unit):
            try:
                manifest = self._read(self._layout.artifact(stage, key))
            except (FileNotFoundError, ArtifactCorruptError):
                continue
            if manifest.unit == unit:
                found.append(manifest)
        return sorted(found, key=lambda manifest: (manifest.created, manifest.key), reverse=True)

    def rebuild_index(self) -> None:
        """Make the index behind `candidates` anew from the artifacts themselves."""
        # of this disk alone, wherever else a subclass looks
        entries = [(found.stage, found.unit, found.key) for found in Store.manifests(self)]
        rebuild_index(self._layout, entries)

    def remove(self, key: str, stage: str | None = None) -> None:
        """Delete an artifact; arguments and errors as of `evict`."""
        self.evict(key, stage)

    def evict(self, key: str, stage: str | None = None) -> None:
        """Delete an artifact from this disk.

        Args:
            key: the key.
            stage: its stage, if known; saves a look into every stage's folder.

        Raises:
            ArtifactMissingError: there is none under this key.
        """
        folder = self._folder(key, stage)
        if folder is None:
            raise ArtifactMissingError(f"no artifact with key {key[:12]} in {self.root}")
        try:
            manifest = self._read(folder)
            drop_from_index(self._layout, manifest.stage, manifest.unit, key)
        except (FileNotFoundError, ArtifactCorruptError):
            pass  # its index entry cannot be known; a stale one is skipped by readers
        move_out(self._layout, folder)

    def _beginning(self, prefix: str) -> list[tuple[str, str]]:
        """Stage and key of all whose keys start so, sorted."""
        return [(stage, key) for stage, key, _ in self._layout.artifacts(prefix=prefix)]

    def _known(self, key: str, stage: str | None = None) -> Manifest:
        """Return a manifest; raises as `open`."""
        return self.open(key, stage).manifest

    def _folder(self, key: str, stage: str | None) -> Path | None:
        """Return the folder of an artifact that is there, whole or not."""
        check_key(key)
        stages = self._layout.stages() if stage is None else [check_stage(stage)]
        folders = (self._layout.artifact(name, key) for name in stages)
        return next((f for f in folders if f.is_dir() and not f.is_symlink()), None)

    def _read(self, folder: Path) -> Manifest:
        manifest = read_manifest(folder)
        if self._layout.artifact(manifest.stage, manifest.key) != folder:
            raise ArtifactCorruptError(
                f"{MANIFEST_NAME} in {folder} belongs to {manifest.stage} {manifest.key[:12]}"
            )
        return manifest

    def _holds(self, path: object) -> bool:
        """Tell whether a path, as an error of the system names it, lies in this store."""
        return isinstance(path, str | os.PathLike) and Path(path).is_relative_to(self.root)

    @staticmethod
    def _is_still(folder: Path, identity: Identity) -> bool:
        return identity is not None and folder_identity(folder) == identity

    def _put_aside(self, folder: Path, manifest: Manifest | None, problems: list[str]) -> None:
        """Report a damaged artifact and take it away."""
        stage, unit = folder.parent.parent.name, manifest.unit if manifest else "of unknown unit"
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        self._on_problem(f"{stage} {unit} ({folder.name[:12]}): {problems[0]}{more}; {self.REMEDY}")
        move_out(self._layout, folder)
