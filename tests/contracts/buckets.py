"""Machines that share a bucket, and what can go wrong with it, for the tests of shared stores."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from obstore.store import MemoryStore

from storage.bucket import Bucket
from storage.bucket_store import BucketStore
from storage.errors import ObjectsError
from storage.keys import recipe_key
from storage.manifest import Manifest
from storage.objects import Object
from storage.s3 import LibraryObjects

ADDRESS = "memory://shared"


class Lost(Exception):
    """The process died here."""


@dataclass
class Faulty(LibraryObjects):
    """Objects in memory that count requests and fail where they are told to.

    Attributes:
        dies_at: part of the name at whose putting the process dies.
        fails_at: part of the name at whose putting the bucket refuses.
    """

    dies_at: str = ""
    fails_at: str = ""
    asked: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(MemoryStore(), ADDRESS, ADDRESS)

    def _put(self, name: str) -> None:
        self.asked.append(f"put {name}")
        if self.dies_at and self.dies_at in name:
            raise Lost
        if self.fails_at and self.fails_at in name:
            raise ObjectsError(f"{ADDRESS}: it cannot be reached")

    def create(self, name: str, data: bytes) -> bool:
        self._put(name)
        return super().create(name, data)

    def send(self, name: str, pieces: Iterable[bytes], size: int) -> None:
        self._put(name)
        super().send(name, pieces, size)

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        self.asked.append(f"read {name}")
        return super().read(name, start, length)

    def names(self, below: str = "") -> list[str]:
        return sorted(entry.name for entry in super().list(below))

    def list(self, below: str) -> Iterator[Object]:
        self.asked.append(f"list {below}")
        return super().list(below)

    def delete(self, names: Sequence[str]) -> None:
        self.asked += [f"delete {name}" for name in names]
        super().delete(names)

    def flip(self, name: str, place: int = -1) -> None:
        data = bytearray(super().read(name))
        data[place] ^= 1
        super().send(name, [bytes(data)], len(data))


def machine(folder: Path, objects: Faulty, problems: list[str] | None = None) -> BucketStore:
    """A store on another machine: another local folder."""
    told = [] if problems is None else problems
    return BucketStore(folder, Bucket(objects), told.append, {"scratch"})


def recipe(name: str) -> dict[str, str]:
    return {"name": name}


def make(
    store: BucketStore,
    name: str,
    value: int = 0,
    *,
    stage: str = "weigh",
    of: Sequence[Manifest] = (),
) -> Manifest:
    """Commits an artifact that holds an array of `value` and a file."""
    key = recipe_key(recipe(name))
    inputs = {f"input {n}": {"key": m.key, "digest": m.digest} for n, m in enumerate(of)}
    with store.draft(
        key=key, stage=stage, unit=f"layer {name}", recipe=recipe(name), inputs=inputs
    ) as draft:
        draft.put("u", np.full((300, 4), value, np.float32))
        draft.add_file("model/note.txt").write_text(f"{name} {value}")
        draft.add_file("empty").write_text("")
    return draft.manifest


def value_of(store: BucketStore, name: str, stage: str = "weigh") -> int | None:
    """What was stored under a name, every byte looked at; None where nothing is found."""
    key = recipe_key(recipe(name))
    if store.find(key, stage) is None:
        return None
    artifact = store.open(key, stage)
    (value,) = set(artifact.array("u").ravel().tolist())
    assert artifact.file("model/note.txt").read_text() == f"{name} {int(value)}"
    return int(value)
