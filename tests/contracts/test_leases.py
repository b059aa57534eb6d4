"""What every store's leases do: one at a time computes a key, and the dead hold nothing."""

import fcntl
import os
import pickle
import resource
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.bucket_gc import collect_shared_garbage
from storage.bucket_store import BucketStore
from storage.errors import LeaseHeldError, StorageError
from storage.gc import collect_garbage
from storage.leases import claim_files
from tests.contracts.buckets import recipe
from tests.contracts.leases import HOLD, HOLD_AND_FORK, STAGE, Place, X, Y, Z, is_held, key_of
from tests.pipeline import pico
from tests.s3_server import Server


def lease_files(place: Place, machine: str = "a") -> list[str]:
    return sorted(path.name for path in place.open(machine).layout.leases.glob("*"))


class Contract:
    """A new kind of store has a class below with its own `place`."""

    @pytest.fixture
    def place(self) -> Place:
        raise NotImplementedError

    @pytest.mark.parametrize("other", ["a", "b"])
    def test_all_are_taken_or_none(self, place: Place, other: str) -> None:
        with place.open().claim(STAGE, [Y]):
            store = place.open(other)
            with pytest.raises(LeaseHeldError):
                store.claim(STAGE, [X, Y, Z])
            with store.claim(STAGE, [Z, X]):
                assert is_held(place.open(), X) and is_held(place.open(), Z)
        assert not is_held(place.open(), X, Y, Z)

    def test_who_holds_it_is_told(self, place: Place) -> None:
        store = place.open()
        with store.claim(STAGE, [X]), pytest.raises(LeaseHeldError) as held:
            store.claim(STAGE, [X])
        assert held.value.who.startswith("process ")
        assert held.value.who.endswith(f" of {socket.gethostname()}")
        assert str(held.value).startswith(f"{STAGE} {X[:12]} is being computed by process ")
        again = pickle.loads(pickle.dumps(held.value))  # as a task passes it on
        assert (again.who, str(again)) == (held.value.who, str(held.value))

    def test_what_is_given_back_can_be_taken(self, place: Place) -> None:
        claim = place.open().claim(STAGE, [X, Y, X])
        claim.give_back()
        with place.open("b").claim(STAGE, [X, Y]):
            claim.give_back()  # nothing is given back twice
            assert is_held(place.open("b"), X) and is_held(place.open("b"), Y)

    def test_an_error_in_the_block_gives_it_back(self, place: Place) -> None:
        with pytest.raises(KeyboardInterrupt), place.open().claim(STAGE, [X]):
            raise KeyboardInterrupt
        assert not is_held(place.open("b"), X)

    def test_no_key_is_no_lease(self, place: Place) -> None:
        with place.open().claim(STAGE, []), place.open().claim(STAGE, []):
            assert lease_files(place) == []

    @pytest.mark.parametrize("machine", ["a", "b"])
    def test_a_process_holds_it_until_it_is_killed(self, place: Place, machine: str) -> None:
        store = place.open(machine)
        with place.process(HOLD, [X, Y, Z]) as process:
            with pytest.raises(LeaseHeldError) as held:
                store.claim(STAGE, [Y])
            assert held.value.who == f"process {process.pid} of {socket.gethostname()}"
            process.kill()
            process.wait()
            with store.claim(STAGE, [X, Y, Z]):
                assert is_held(place.open(), X)
        assert not is_held(place.open(), X, Y, Z)

    def test_a_forked_child_has_none_of_it(self, place: Place) -> None:
        with place.process(HOLD_AND_FORK, [X]) as process:
            assert is_held(place.open(), X) and is_held(place.open("b"), X)  # though the child left
            process.kill()
            process.wait()
            assert not is_held(place.open(), X)  # the child still runs

    def test_of_many_who_want_the_same_at_once_one_gets_all(self, place: Place) -> None:
        stores = [place.open(machine) for machine in "aabcd"]
        gate, end = threading.Barrier(len(stores)), threading.Barrier(len(stores))
        outcomes = []

        def work(number: int) -> None:
            gate.wait()
            try:
                with stores[number].claim(STAGE, [Z, X, Y] if number % 2 else [X, Y, Z]):
                    outcomes.append(True)
                    end.wait()
            except LeaseHeldError:
                outcomes.append(False)
                end.wait()

        threads = [threading.Thread(target=work, args=(n,)) for n in range(len(stores))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == [False] * (len(stores) - 1) + [True]
        assert not is_held(place.open(), X, Y, Z)

    def test_behind_a_claim_is_found_what_was_put_before(self, place: Place) -> None:
        store = place.open("b")
        other = place.open()
        key = key_of("x")
        with (
            other.claim(STAGE, [key]),
            other.draft(key=key, stage=STAGE, unit="u", recipe=recipe("x"), inputs={}) as draft,
        ):
            draft.attrs["one"] = 1
        with store.claim(STAGE, [key]):
            assert store.find(key) == store.peek(key) == draft.manifest

    def test_what_others_have_put_is_seen_by_who_looks_again(self, place: Place) -> None:
        store = place.open("b")
        key = key_of("x")
        with place.open().draft(
            key=key, stage=STAGE, unit="u", recipe=recipe("x"), inputs={}
        ) as draft:
            draft.attrs["one"] = 1
        store.look_again(STAGE, [X, key, key])
        assert store.peek(key) == draft.manifest
        assert store.stages() == [STAGE]

    def test_leases_are_no_strays_and_no_stage(self, place: Place) -> None:
        store = place.open()
        store.begin()
        with store.claim(STAGE, [X]):
            assert list(store.strays()) == [] and store.stages() == []
        with pytest.raises(StorageError, match="a stage is named"):
            store.claim("leases", [X])
        with pytest.raises(StorageError, match="a key is 64"):
            store.claim(STAGE, ["x"])

    def test_what_the_dead_left_is_harmless_and_gc_deletes_it(self, place: Place) -> None:
        with place.process(HOLD, [X, Y]) as process:
            process.kill()
        store = place.open()
        assert lease_files(place) == sorted([X, Y])
        assert list(store.strays()) == [] and store.stages() == []
        with store.claim(STAGE, [X]):
            report = collect_garbage(store, [], dry_run=False)
            assert lease_files(place) == [X] and is_held(place.open(), X)
        assert report.orphans == [] and report.freed_bytes == 0
        assert lease_files(place) == []


class TestLocal(Contract):
    @pytest.fixture
    def place(self, tmp_path: Path) -> Place:
        return Place(tmp_path)

    def test_a_file_that_was_given_back_before_it_is_locked_is_no_lease(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Between opening and locking, the holder goes and another one comes."""
        layout = place.open().layout
        held = [claim_files(layout, STAGE, [X])]
        flock = fcntl.flock

        def late(handle: int, how: int) -> None:
            monkeypatch.setattr(fcntl, "flock", flock)
            held.pop().give_back()
            held.append(claim_files(layout, STAGE, [X]))
            flock(handle, how)

        monkeypatch.setattr(fcntl, "flock", late)
        with pytest.raises(LeaseHeldError):
            claim_files(layout, STAGE, [X])
        held.pop().give_back()

    def test_what_is_in_the_way_is_one_sentence_and_stays(self, place: Place) -> None:
        store = place.open()
        store.layout.leases.write_text("")
        with pytest.raises(StorageError, match=r"leases is a file where a folder belongs"):
            store.claim(STAGE, [X])
        store.layout.leases.unlink()
        (store.layout.leases / Y).mkdir(parents=True)
        with pytest.raises(StorageError, match=f"{Y} is a folder where a file belongs"):
            store.claim(STAGE, [X, Y])
        collect_garbage(store, [], dry_run=False)
        assert lease_files(place) == [Y] and not is_held(store, X)

    def test_files_of_others_stay(self, place: Place) -> None:
        store = place.open()
        store.layout.leases.mkdir()
        (store.layout.leases / "notes.txt").write_text("x")
        collect_garbage(store, [], dry_run=False)
        assert lease_files(place) == ["notes.txt"]

    def test_a_claim_on_a_deleted_store_leaves_the_new_one_alone(self, place: Place) -> None:
        store = place.open()
        old = store.claim(STAGE, [X])
        shutil.rmtree(store.layout.leases)
        with store.claim(STAGE, [X]):
            old.give_back()
            assert lease_files(place) == [X] and is_held(store, X)
        assert not is_held(store, X)

    def test_more_leases_than_a_process_may_have_files(self, place: Place) -> None:
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        keys = [key_of(str(number)) for number in range(200)]
        held = max(int(name) for name in os.listdir("/dev/fd"))  # by the tests before this one
        resource.setrlimit(resource.RLIMIT_NOFILE, (held + 100, before[1]))
        try:
            with place.open().claim(STAGE, keys):
                assert len(lease_files(place)) == len(keys)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)


class TestFolder(Contract):
    @pytest.fixture
    def place(self, tmp_path: Path) -> Place:
        return Place(tmp_path, (tmp_path / "shared").as_uri())


class TestS3(Contract):
    @pytest.fixture
    def place(self, s3: Server, tmp_path: Path) -> Iterator[Place]:
        with pico.environment(pico.clean_environment(**s3.environment)):
            yield Place(tmp_path, s3.address())

    def test_the_bucket_is_empty_when_all_is_given_back(self, place: Place, s3: Server) -> None:
        assert place.address is not None
        with place.open().claim(STAGE, [X, Y, Z]):
            held = s3.names(place.address)
            store = place.open("b")
            assert isinstance(store, BucketStore)
            collect_shared_garbage(store, [], dry_run=False)
            assert s3.names(place.address) == held
        assert held == [f"leases/{STAGE}/{key}/1" for key in (X, Y, Z)]
        assert s3.names(place.address) == []
