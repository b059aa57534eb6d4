"""Machines at work on one bucket, in any order, against a model that is two dictionaries."""

import shutil
import tempfile
from datetime import timedelta
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from storage.bucket_gc import collect_shared_garbage
from storage.bucket_store import BucketStore
from storage.errors import LeaseHeldError
from storage.keys import recipe_key
from tests.contracts.buckets import Faulty, Lost, machine, make, recipe, value_of

PLACES = ("payload", "index", "manifests")
names, machines = st.sampled_from(("x", "y", "z")), st.sampled_from((0, 1))


def key_of(name: str) -> str:
    return recipe_key(recipe(name))


class SharedStore(RuleBasedStateMachine):
    """`here` and `there` say what value a disk or the bucket has under a name."""

    def __init__(self) -> None:
        super().__init__()
        self.files = tempfile.TemporaryDirectory()
        self.folder = Path(self.files.name)
        self.objects = Faulty()
        self.count = 0
        self.here: list[dict[str, int]] = [{}, {}]
        self.there: dict[str, int] = {}
        self.damaged: dict[str, str] = {}  # name -> what of it

    def teardown(self) -> None:
        self.files.cleanup()

    def open(self, one: int) -> BucketStore:
        """A new process on a machine."""
        return machine(self.folder / f"machine-{one}", self.objects)

    def expected(self, one: int, name: str) -> int | None:
        """What a machine finds; afterwards the model is as disk and bucket are."""
        if name in self.here[one]:
            self.there.setdefault(name, self.here[one][name])
        elif name in self.damaged:
            del self.there[name], self.damaged[name]
        elif name in self.there:
            self.here[one][name] = self.there[name]
        return self.here[one].get(name)

    @rule(one=machines, name=names)
    def find_or_make(self, one: int, name: str) -> None:
        store = self.open(one)
        found = value_of(store, name)
        assert found == self.expected(one, name)
        if found is None:
            self.count += 1
            make(store, name, self.count)
            self.here[one][name] = self.there[name] = self.count

    @rule(one=machines, name=names)
    def find_or_make_under_a_lease(self, one: int, name: str) -> None:
        with self.open(one).claim("weigh", [key_of(name)]):
            for other in (0, 1):
                with pytest.raises(LeaseHeldError):
                    self.open(other).claim("weigh", [key_of(name)])
            self.find_or_make(one, name)

    @rule(one=machines, name=names)
    def find(self, one: int, name: str) -> None:
        assert value_of(self.open(one), name) == self.expected(one, name)

    def unused(self) -> list[str]:
        return [n for n in "xyz" if not any(n in known for known in (*self.here, self.there))]

    @precondition(lambda self: bool(self.unused()))
    @rule()
    def make_the_same_at_once(self) -> None:
        name = self.unused()[0]
        stores = [self.open(0), self.open(1)]
        first = self.count + 1
        for one, store in enumerate(stores):
            self.count += 1
            make(store, name, self.count)
            self.here[one][name] = first
        self.there[name] = first
        assert [value_of(store, name) for store in stores] == [first, first]

    @rule(one=machines, name=names, place=st.sampled_from(PLACES))
    def die_while_putting(self, one: int, name: str, place: str) -> None:
        if name in self.there:
            return  # nothing would be put
        self.count += 1
        self.objects.dies_at = place
        with pytest.raises(Lost):
            make(self.open(one), name, self.count)
        self.objects.dies_at = ""
        self.here[one].setdefault(name, self.count)

    @rule(one=machines)
    def lose_the_folder(self, one: int) -> None:
        shutil.rmtree(self.folder / f"machine-{one}", ignore_errors=True)
        self.here[one] = {}

    @rule(one=machines, name=names)
    def remove(self, one: int, name: str) -> None:
        if name in self.here[one] or name in self.there:
            self.open(one).remove(key_of(name))
        self.here[one].pop(name, None)
        self.there.pop(name, None)
        self.damaged.pop(name, None)

    @precondition(lambda self: bool(set(self.there) - set(self.damaged)))
    @rule(data=st.data(), what=st.sampled_from(("payload", "manifests")), byte=st.integers(0, 99))
    def damage(self, data: st.DataObject, what: str, byte: int) -> None:
        name = data.draw(st.sampled_from(sorted(set(self.there) - set(self.damaged))))
        for found in self.objects.names(what):  # bytes that no manifest names among them
            if key_of(name) in found:
                self.objects.flip(found, byte)
        self.damaged[name] = what

    @rule(one=machines, roots=st.sets(names))
    def collect(self, one: int, roots: set[str]) -> None:
        keys = [key_of(name) for name in roots]
        collect_shared_garbage(self.open(one), keys, False, timedelta(0))
        unreadable = {name for name, what in self.damaged.items() if what == "manifests"}
        stay = roots - unreadable
        self.here[one] = {n: v for n, v in self.here[one].items() if n in roots}
        self.there = {n: v for n, v in self.there.items() if n in stay}
        self.damaged = {n: v for n, v in self.damaged.items() if n in stay}
        left = sorted(name.split("/")[2] for name in self.objects.names("payload"))
        assert left == sorted(map(key_of, self.there))  # and nothing that a crash has left

    @invariant()
    def the_bucket_has_what_the_model_says(self) -> None:
        found = {name.split("/")[-1] for name in self.objects.names("manifests")}
        assert found == set(map(key_of, self.there))
        assert self.objects.names("leases") == []


TestSharedStore = SharedStore.TestCase
TestSharedStore.settings = settings(max_examples=20, stateful_step_count=15, deadline=None)
