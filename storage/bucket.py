"""Artifacts as objects: a manifest, and one object with all files, one after another, beside it.

    FORMAT.json                           that of the store
    payload/<stage>/<key>/<attempt>       the files, in the order of their names, if there are any
    index/<stage>/<hash of unit>/<key>    empty: which keys a unit had
    manifests/<stage>/<key>               manifest, and which attempt it belongs to
    runs/<name>                           what a run used
    leases/<stage>/<key>/<generation>     who computes a key, for as long as that takes

The first four are put in this order. Who puts a manifest first has the key; every attempt has its
own name, so that two who make the same artifact at once never mix their bytes.
"""

import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.disk import each
from storage.errors import ArtifactCorruptError, ObjectsError, StorageError
from storage.layout import Layout, check_key, check_stage
from storage.manifest import FORMAT, Manifest, require_format
from storage.objects import Object, Objects
from storage.pack import pack, problems_of, unpack
from storage.records import NoRecordError, seal, unseal
from storage.root import FORMAT_NAME

MANIFESTS, PAYLOAD, INDEX = "manifests", "payload", "index"
RUNS, LEASES = "runs", "leases"
_ANY_UNIT = Layout(Path())  # only for the name of a unit's folder


@dataclass(frozen=True)
class Placed:
    """An artifact in a bucket: what its manifest says, word for word, and where its bytes are."""

    manifest: Manifest
    text: str
    payload: str


class Bucket:
    """The artifacts below one address.

    Args:
        objects: what is there.
    """

    def __init__(self, objects: Objects) -> None:
        self.objects = objects
        self._read: dict[tuple[str, str], tuple[str, Placed]] = {}  # version, what it held

    @property
    def address(self) -> str:
        """What people call the place."""
        return self.objects.address

    def check(self) -> None:
        """Refuse a place that cannot be reached or read, or that a newer version wrote.

        Raises:
            ObjectsError: it cannot be used.
            StoreVersionError: it has a newer format.
        """
        try:
            text = self.objects.read(FORMAT_NAME)
        except FileNotFoundError:  # nothing was put there yet
            return
        try:
            found = unseal(text).get("format")
            if not isinstance(found, int):
                raise NoRecordError(f"its format is {found!r}")
        except NoRecordError as error:
            raise ObjectsError(
                f"{self.address}/{FORMAT_NAME} is damaged ({error}): "
                "if there is a store, delete that object and it is put anew"
            ) from None
        require_format(found, self.address)

    def begin(self) -> None:
        """Refuse a place that cannot be written, by putting the format; it is put once.

        Raises:
            ObjectsError: it cannot be written, or what is there would be replaced.
        """
        text = seal({"format": FORMAT})
        if self.objects.create(FORMAT_NAME, text) and self.objects.create(FORMAT_NAME, text):
            raise ObjectsError(
                f"{self.address} replaces what is there when asked to put only what is not "
                "(If-None-Match): two runs could not share it"
            )

    def listed(self, stage: str | None = None) -> dict[tuple[str, str], Object]:
        """Stage and key of every manifest, or of those of one stage, sorted."""
        below = f"{MANIFESTS}/{check_stage(stage)}" if stage else MANIFESTS
        named = ((_stage_and_key(entry.name), entry) for entry in self.objects.list(below))
        return dict(sorted((place, entry) for place, entry in named if place is not None))

    def versions(self, stage: str, keys: Iterable[str]) -> dict[str, str]:
        """Return the versions of manifests, as they are there now, of those keys that have one."""
        found = each(lambda key: (key, self.objects.stat(_manifest(stage, key))), keys)
        return {key: entry.version for key, entry in found if entry is not None}

    def read(self, stage: str, key: str) -> Placed | None:
        """Return the artifact of a key as it is there now; None if there is none.

        Raises:
            ArtifactCorruptError: its manifest is damaged.
            StoreVersionError: a newer version put it.
        """
        try:
            text = self.objects.read(_manifest(stage, key))
        except FileNotFoundError:
            return None
        return _placed(text, stage, key, self.address)

    def read_all(
        self, wanted: Mapping[tuple[str, str], str]
    ) -> dict[tuple[str, str], Placed | ArtifactCorruptError | None]:
        """Return artifacts, several at a time; what has not changed since is not asked again.

        Args:
            wanted: stage and key to the version of the manifest in a listing.
        """

        def one(place: tuple[str, str]) -> Placed | ArtifactCorruptError | None:
            version, known = self._read.get(place, ("", None))
            if known is not None and version == wanted[place]:
                return known
            try:
                found = self.read(*place)
            except ArtifactCorruptError as error:
                return error
            if found is not None:
                self._read[place] = wanted[place], found
            return found

        return dict(zip(wanted, each(one, wanted), strict=True))

    def send(self, manifest: Manifest, text: str, folder: Path) -> Placed:
        """Put an artifact, unless somebody else has put one under its key.

        Args:
            manifest: what `text` says.
            text: the manifest file's text.
            folder: its files.

        Returns:
            The artifact that is there then.

        Raises:
            ArtifactCorruptError: somebody else's manifest is damaged.
        """
        stage, key, attempt = manifest.stage, manifest.key, secrets.token_hex(8)
        ours = Placed(manifest, text, f"{PAYLOAD}/{stage}/{key}/{attempt}")
        record = seal({"format": FORMAT, "payload": attempt, "manifest": text})
        if manifest.nbytes:
            self.objects.send(ours.payload, pack(manifest, folder), manifest.nbytes)
        # before the manifest: an entry without an artifact is harmless, the reverse would hide one
        self.objects.create(_entry(stage, manifest.unit, key), b"")
        while not self.objects.create(_manifest(stage, key), record):
            winner = self.read(stage, key)
            if winner is not None:  # perhaps we, where the answer to a first request was lost
                if winner.payload != ours.payload:
                    self.objects.delete([ours.payload])
                return winner
        return ours

    def fetch(self, placed: Placed, folder: Path) -> bool:
        """Write an artifact's files into a folder; False if the bucket has not got them.

        What they hold is to be checked there.
        """
        return unpack(self.objects, placed.payload, placed.manifest, folder)

    def problems(self, placed: Placed) -> list[str]:
        """List what is wrong with an artifact's bytes, in words; every one is read."""
        return problems_of(self.objects, placed.payload, placed.manifest)

    def drop(self, stage: str, key: str, placed: Placed | None = None) -> None:
        """Delete an artifact's manifest, and where it is known its entry in the index and bytes.

        Bytes of other attempts stay: one of them may be waiting for its manifest.
        """
        self.objects.delete([_manifest(stage, key)])
        if placed is not None:
            self.objects.delete([_entry(stage, placed.manifest.unit, key), placed.payload])

    def index(self) -> dict[tuple[str, str], list[str]]:
        """Stage and hash of a unit to the keys noted for it; some may be gone."""
        found: dict[tuple[str, str], list[str]] = {}
        for entry in self.objects.list(INDEX):
            parts = entry.name.split("/")
            if len(parts) == 4:
                found.setdefault((parts[1], parts[2]), []).append(parts[3])
        return found

    def payloads(self) -> Iterator[Object]:
        """Yield the files of all artifacts, and of those that never got a manifest."""
        return (one for one in self.objects.list(PAYLOAD) if len(one.name.split("/")) == 4)

    def note(self, name: str, fields: Mapping[str, Any]) -> None:
        """Put what a run used."""
        self.objects.create(f"{RUNS}/{name}", seal({"format": FORMAT, **fields}))

    def notes(self) -> dict[str, dict[str, Any]]:
        """Return what every run used, by its name.

        Raises:
            ObjectsError: a note is damaged, so that nobody knows what its run used.
        """
        names = [entry.name for entry in self.objects.list(RUNS)]

        def one(name: str) -> dict[str, Any] | None:
            try:
                return unseal(self.objects.read(name))
            except FileNotFoundError:
                return None
            except NoRecordError as error:
                raise ObjectsError(
                    f"{self.address}/{name} is damaged ({error}), so what that run needs is not "
                    "known; delete it if it needs nothing any more"
                ) from None

        found = zip(names, each(one, names), strict=True)
        return {name.partition("/")[2]: fields for name, fields in found if fields is not None}

    def strays(self) -> Iterator[str]:
        """Yield the names of objects that have no place in a store."""
        lengths = {MANIFESTS: 3, PAYLOAD: 4, INDEX: 4, RUNS: 2, LEASES: 4}
        for entry in self.objects.list(""):
            first, *_ = parts = entry.name.split("/")
            wrong = entry.name != FORMAT_NAME and lengths.get(first) != len(parts)
            if wrong or (first == MANIFESTS and not _stage_and_key(entry.name)):
                yield f"{self.address}/{entry.name}"


def unit_of(stage: str, unit: str) -> tuple[str, str]:
    """Return what a unit has in the index of a bucket: its stage and its hash."""
    return stage, _ANY_UNIT.index(stage, unit).name


def _manifest(stage: str, key: str) -> str:
    return f"{MANIFESTS}/{check_stage(stage)}/{check_key(key)}"


def _entry(stage: str, unit: str, key: str) -> str:
    return "/".join((INDEX, *unit_of(stage, unit), key))


def _stage_and_key(name: str) -> tuple[str, str] | None:
    """Return what a manifest's name says; None of a name that no manifest has."""
    try:
        _, stage, key = name.split("/")
        return check_stage(stage), check_key(key)
    except (ValueError, StorageError):
        return None


def _placed(text: bytes, stage: str, key: str, address: str) -> Placed:
    where = f"{address}/{_manifest(stage, key)}"
    try:
        record = unseal(text)
        attempt, inner = str(record["payload"]), str(record["manifest"])
    except (NoRecordError, KeyError) as error:
        raise ArtifactCorruptError(f"its manifest is damaged ({error})") from None
    require_format(int(record.get("format", 0)), where)
    manifest = Manifest.from_json(inner, where)
    if (manifest.stage, manifest.key) != (stage, key):
        raise ArtifactCorruptError(f"its manifest belongs to {manifest.stage} {manifest.key[:12]}")
    return Placed(manifest, inner, f"{PAYLOAD}/{stage}/{key}/{attempt}")
