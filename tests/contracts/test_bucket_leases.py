"""Leases of machines that share a bucket: the dead, the slow, and a bucket that fails."""

import threading
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path

import pytest

from storage.bucket import Bucket
from storage.bucket_gc import collect_shared_garbage
from storage.bucket_leases import LEASE_SECONDS, BucketLeases
from storage.bucket_store import BucketStore
from storage.errors import LeaseHeldError, ObjectsError
from storage.records import seal, unseal
from tests.contracts.buckets import Faulty, machine
from tests.contracts.leases import NEVER, STAGE, Machines, X, Y, Z, holds, is_held
from tests.patience import wait_for

FIRST = f"leases/{STAGE}/{X}/1"


@pytest.fixture
def machines() -> Machines:
    return Machines()


def test_a_holder_that_renews_is_never_taken_over(machines: Machines) -> None:
    other = machines.leases("b")
    with machines.leases("a", 0.001).claim(STAGE, [X]):
        for _ in range(10):
            assert not holds(other, X)
            machines.clock.now += 0.9 * LEASE_SECONDS
            before = machines.objects.read(FIRST)
            wait_for(lambda text=before: machines.objects.read(FIRST) != text)  # type: ignore[misc]


def test_a_holder_that_stopped_is_taken_over_once_it_was_watched(machines: Machines) -> None:
    machines.leases("a").claim(STAGE, [X])
    machines.clock.now += 10 * LEASE_SECONDS
    other = machines.leases("b")  # has not watched it yet
    assert not holds(other, X)
    machines.clock.now += LEASE_SECONDS - 1
    assert not holds(other, X)
    machines.clock.now += 1
    with other.claim(STAGE, [X]):
        assert machines.objects.names() == [f"leases/{STAGE}/{X}/2"]
        assert not holds(machines.leases("c"), X)
    assert machines.objects.names() == []
    assert holds(machines.leases("c"), X)


def test_one_turn_is_enough_to_be_alive(machines: Machines) -> None:
    lease = machines.leases("a", 0.001).claim(STAGE, [X])
    other = machines.leases("b")
    assert not holds(other, X)
    before = machines.objects.read(FIRST)
    wait_for(lambda: machines.objects.read(FIRST) != before)
    machines.clock.now += 2 * LEASE_SECONDS
    assert not holds(other, X)
    lease.give_back()


def test_a_holder_that_stood_still_takes_nothing_from_who_followed(machines: Machines) -> None:
    slow = machines.leases("a").claim(STAGE, [X])
    other = machines.leases("b")
    assert not holds(other, X)
    machines.clock.now += LEASE_SECONDS
    assert holds(other, X)
    with machines.leases("c").claim(STAGE, [X]):
        assert machines.objects.names() == [FIRST]  # the slow one's number, anew
        slow.give_back()
        assert machines.objects.names() == [FIRST]


def test_a_slow_taker_does_not_begin_beside_who_began_anew(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It knew a dead lease; meanwhile that was followed, given back, and its number taken."""
    machines.leases("dead").claim(STAGE, [X])
    slow, quick = machines.leases("a"), machines.leases("b")
    assert not holds(slow, X) and not holds(quick, X)
    machines.clock.now += LEASE_SECONDS
    create, held = machines.objects.create, []

    def late(name: str, data: bytes) -> bool:
        monkeypatch.setattr(machines.objects, "create", create)
        assert holds(quick, X)
        held.append(machines.leases("c").claim(STAGE, [X]))
        return create(name, data)

    monkeypatch.setattr(machines.objects, "create", late)
    with pytest.raises(LeaseHeldError):
        slow.claim(STAGE, [X])
    assert machines.objects.names() == [FIRST]
    held.pop().give_back()
    assert holds(slow, X)


def test_what_is_deleted_before_it_was_looked_at_is_not_held(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = machines.objects.create

    def in_vain(name: str, data: bytes) -> bool:
        made = create(name, data)
        machines.objects.delete([name])
        return made

    monkeypatch.setattr(machines.objects, "create", in_vain)
    assert not holds(machines.leases("a"), X)


def test_an_answer_that_got_lost_is_no_defeat(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = machines.objects.create

    def twice(name: str, data: bytes) -> bool:
        create(name, data)
        return create(name, data)

    monkeypatch.setattr(machines.objects, "create", twice)
    assert holds(machines.leases("a"), X)


@pytest.mark.parametrize("text", [b"", b"{}", seal({"format": 1}), seal({"pid": "x", "host": 1})])
def test_a_lease_that_says_nothing_ends_when_it_was_watched(
    machines: Machines, text: bytes
) -> None:
    machines.objects.create(FIRST, text)
    other = machines.leases("b")
    with pytest.raises(LeaseHeldError, match="another machine"):
        other.claim(STAGE, [X])
    machines.clock.now += LEASE_SECONDS
    assert holds(other, X)


def test_a_bucket_that_refuses_leaves_nothing_held(tmp_path: Path) -> None:
    objects = Faulty()
    store = machine(tmp_path / "a", objects)
    objects.fails_at = Y
    with pytest.raises(ObjectsError, match="cannot be reached"):
        store.claim(STAGE, [X, Y, Z])
    assert objects.names() == []
    assert not is_held(store, X, Z)


def test_a_turn_that_fails_is_made_up_for(machines: Machines) -> None:
    with machines.leases("a", 0.001).claim(STAGE, [X]):
        machines.objects.fails_at = FIRST
        before = len(machines.objects.asked)
        wait_for(lambda: machines.objects.asked[before:].count(f"put {FIRST}") > 3)
        text = machines.objects.read(FIRST)
        machines.objects.fails_at = ""
        wait_for(lambda: machines.objects.read(FIRST) != text)
    assert machines.objects.names() == []


def test_a_turn_on_its_way_does_not_outlive_what_is_given_back(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = machines.objects.send
    begun, go, ended = threading.Event(), threading.Event(), threading.Event()

    def slow(name: str, pieces: Iterable[bytes], size: int) -> None:
        begun.set()
        go.wait()
        send(name, pieces, size)
        ended.set()

    monkeypatch.setattr(machines.objects, "send", slow)
    claim = machines.leases("a", 0.001).claim(STAGE, [X])
    begun.wait()
    end = threading.Thread(target=claim.give_back)
    end.start()
    end.join(0.05)
    go.set()
    end.join()
    ended.wait()
    assert machines.objects.names() == []


def test_what_cannot_be_given_back_is_told_and_ends_by_itself(
    machines: Machines, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(names: Sequence[str]) -> None:
        raise ObjectsError("it cannot be reached")

    with machines.leases("a").claim(STAGE, [X]):
        monkeypatch.setattr(machines.objects, "delete", refuse)
    assert "not given back" in caplog.text
    monkeypatch.undo()
    assert not holds(machines.leases("b"), X)


def test_what_stays_on_a_disk_is_leased_there(tmp_path: Path) -> None:
    objects = Faulty()
    store = machine(tmp_path / "a", objects)
    objects.asked.clear()
    with store.claim("scratch", [X]):
        with pytest.raises(LeaseHeldError):
            store.claim("scratch", [X])
        machine(tmp_path / "b", objects).claim("scratch", [X]).give_back()
    assert not any(X in line for line in objects.asked)


def test_gc_deletes_only_leases_that_are_old(tmp_path: Path) -> None:
    objects = Faulty()
    elsewhere = BucketLeases(objects, host="elsewhere", renew_seconds=NEVER)
    elsewhere.claim(STAGE, [X])
    store = machine(tmp_path / "a", objects)
    collect_shared_garbage(store, [], False)
    collect_shared_garbage(store, [], True, timedelta(0))
    assert objects.names() == [FIRST] and list(store.strays()) == []
    report = collect_shared_garbage(store, [], False, timedelta(0))
    assert report.there is not None and report.there.orphans == []
    assert objects.names() == []


def test_a_lease_says_who_and_where(tmp_path: Path) -> None:
    objects = Faulty()
    store = BucketStore(tmp_path, Bucket(objects), pytest.fail)
    with store.claim(STAGE, [X]):
        fields = unseal(objects.read(FIRST))
    assert {"format", "token", "turn", "host", "pid", "who"} == set(fields)
