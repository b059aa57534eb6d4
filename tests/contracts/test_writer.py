"""Commits beside the computation: in order, whole before the group ends, and their errors its."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import pytest

from storage.draft import Draft
from storage.errors import ObjectsError, StorageError, StoreFullError
from storage.gc import collect_garbage
from storage.leases import Claim
from storage.store import Store
from tasks.engine.session import Session
from tasks.engine.units import Outcome, Unit
from tasks.engine.work import Group, Interrupted, Work
from tasks.engine.writer import MOST, Writer
from tests.contracts.buckets import Faulty, machine
from tests.contracts.stores import drafts

LONG = 60.0  # seconds after which a test that waits for what never comes fails


class Commits:
    """What becomes of commits: they wait for `gate`, and fail where they are told to.

    Attributes:
        gate: Open from the beginning; a test closes it, and opens it when it has seen enough.
        begun: Names of units whose commit has begun.
        made: Names of those that were committed.
        threads: That did it.
        errors: Unit to what its commit raises.
    """

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.begun: list[str] = []
        self.made: list[str] = []
        self.threads: set[threading.Thread] = set()
        self.errors: dict[str, BaseException] = {}

    def __call__(self, draft: Draft, commit: Callable[[Draft], None]) -> None:
        self.begun.append(draft.unit)
        self.threads.add(threading.current_thread())
        assert self.gate.wait(LONG), "nobody opened the gate: the computation waits for a commit"
        if draft.unit in self.errors:
            raise self.errors[draft.unit]
        commit(draft)
        self.made.append(draft.unit)


@pytest.fixture
def commits(monkeypatch: pytest.MonkeyPatch) -> Commits:
    """Watches every commit."""
    found, commit = Commits(), Draft.commit
    monkeypatch.setattr(Draft, "commit", lambda self: found(self, commit))
    monkeypatch.setattr("tasks.engine.units.fingerprint", lambda code: {})
    return found


def units(count: int) -> list[Unit]:
    return [Unit("decompose", f"layer {n}", settings={"n": n}) for n in range(count)]


def put(work: Work, unit: Unit) -> None:
    with work.draft(unit) as draft:
        draft.put("u", np.full((300, 4), unit.settings["n"]))


def put_all(work: Work) -> None:
    for unit in work.missing:
        put(work, unit)


def run(store: Store, compute: Callable[[Work], None], count: int = 3) -> list[Outcome]:
    return Session(store).run(Group("decompose", "block 0", units(count), compute))


def names(store: Store) -> list[str]:
    return sorted(manifest.unit for manifest in store.manifests())


@contextmanager
def opening(commits: Commits, monkeypatch: pytest.MonkeyPatch, at: str) -> Iterator[list[int]]:
    """Closed until the writer is asked to wait; notes how many commits it had been given then."""
    found: list[int] = []
    wait = getattr(Writer, at)

    def opens(self: Writer, *args: Any) -> None:
        found.append(len(self._waiting))
        commits.gate.set()
        wait(self, *args)

    with monkeypatch.context() as patched:
        commits.gate.clear()
        patched.setattr(Writer, at, opens)
        yield found


def test_the_next_unit_is_computed_while_the_last_is_committed(
    store: Store, commits: Commits
) -> None:
    commits.gate.clear()

    def compute(work: Work) -> None:
        put(work, work.missing[0])
        put(work, work.missing[1])  # the first is still being committed
        commits.gate.set()

    run(store, compute, 2)
    assert names(store) == ["layer 0", "layer 1"]


def test_commits_come_one_after_another_in_the_order_of_the_computation(
    store: Store, commits: Commits
) -> None:
    outcomes = run(store, put_all, 12)
    assert commits.made == [outcome.unit for outcome in outcomes]
    (thread,) = commits.threads
    assert thread is not threading.current_thread() and not thread.is_alive()


def test_all_is_whole_and_known_before_leases_end_and_the_group(
    store: Store, commits: Commits, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    ended = Claim.__exit__

    def noting(self: Claim, *error: Any) -> None:
        seen.append(names(store))
        ended(self, *error)

    monkeypatch.setattr(Claim, "__exit__", noting)
    session, asked = Session(store), units(3)

    def after(session: Session, recipe: Any) -> None:
        seen.append([unit.name for unit in session.manifests])

    with opening(commits, monkeypatch, "__exit__") as waiting:
        session.run(Group("decompose", "block 0", asked, put_all, after))
    assert waiting == [3]  # nothing had been committed when the computation ended
    assert seen == [["layer 0", "layer 1", "layer 2"]] * 2
    assert drafts(store) == []


ASKING: dict[str, Callable[[Work, Unit], object]] = {
    "its artifact": lambda work, unit: work.artifact(unit).array("u"),
    "its key": lambda work, unit: work.session.manifests[unit].key,
    "the store": lambda work, unit: work.session.store.open(work.keys[unit]),
}


@pytest.mark.parametrize("asks", ASKING)
def test_whoever_asks_for_what_is_being_committed_waits_for_it(
    asks: str, store: Store, commits: Commits, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compute(work: Work) -> None:
        put(work, work.missing[0])
        with opening(commits, monkeypatch, "wait"):
            ASKING[asks](work, work.missing[0])
        put(work, work.missing[1])

    run(store, compute, 2)
    assert names(store) == ["layer 0", "layer 1"]


def test_only_so_many_wait(store: Store, commits: Commits, monkeypatch: pytest.MonkeyPatch) -> None:
    with opening(commits, monkeypatch, "wait") as waiting:
        run(store, put_all, 3 * MOST)
    assert waiting[0] == max(waiting) == MOST
    assert len(names(store)) == 3 * MOST


def test_what_the_computation_changes_afterwards_is_not_kept(
    store: Store, commits: Commits, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compute(work: Work) -> None:
        array, curve = np.zeros(3), [1.0]
        with work.draft(work.missing[0]) as draft:
            draft.put("u", array)
            draft.attrs["curve"] = curve
        array += 1
        curve.append(2.0)

    with opening(commits, monkeypatch, "__exit__"):
        (outcome,) = run(store, compute, 1)
    artifact = store.open(outcome.key)
    assert artifact.attrs["curve"] == [1.0]
    assert artifact.array("u").tolist() == [0.0] * 3


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def goes_on(work: Work) -> None:
    """Computes without end."""
    put_all(work)
    for _ in range(int(LONG * 100)):
        work.progress(0, 1)
        work.session.stopping.wait(0.01)


@pytest.mark.parametrize("fails", [0, 1, 2])
@pytest.mark.parametrize("compute", [put_all, goes_on])
def test_a_full_disk_ends_the_group_in_the_same_words_and_loses_nothing(
    fails: int, compute: Callable[[Work], None], store: Store, commits: Commits
) -> None:
    commits.errors = {f"layer {fails}": full()}
    with pytest.raises(
        StoreFullError, match=f"disk full while writing decompose layer {fails}"
    ) as e:
        run(store, compute)
    assert "nothing committed is lost; free space and run the same command again" in str(e.value)
    assert e.value.__notes__ == [f"stage decompose, block 0, layer {fails}"]
    assert commits.made == names(store) == [f"layer {n}" for n in range(fails)]
    assert drafts(store) == []
    commits.errors.clear()
    again = run(store, put_all)  # which the leases allow
    assert [outcome.state for outcome in again] == ["cached"] * fails + ["computed"] * (3 - fails)


@pytest.mark.parametrize("error", [ZeroDivisionError("of numbers"), KeyboardInterrupt()])
def test_what_was_handed_over_is_kept_when_the_computation_fails(
    error: BaseException, store: Store, commits: Commits, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compute(work: Work) -> None:
        put(work, work.missing[0])
        put(work, work.missing[1])
        raise error

    with opening(commits, monkeypatch, "__exit__") as waiting, pytest.raises(type(error)) as raised:
        run(store, compute)
    assert raised.value is error and waiting == [2]
    if isinstance(error, Exception):
        assert error.__notes__ == ["stage decompose, block 0, layer 2"]
    assert names(store) == ["layer 0", "layer 1"]
    assert drafts(store) == []


def test_what_was_handed_over_is_kept_when_the_command_is_told_to_stop(
    store: Store, commits: Commits, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compute(work: Work) -> None:
        put(work, work.missing[0])
        work.session.stopping.set()
        work.progress(1, 3)

    with opening(commits, monkeypatch, "__exit__"), pytest.raises(Interrupted):
        run(store, compute)
    assert names(store) == ["layer 0"]


def test_an_interrupt_of_the_last_wait_does_not_leave_commits_alone(
    store: Store, commits: Commits, monkeypatch: pytest.MonkeyPatch
) -> None:
    join = threading.Thread.join
    told: list[list[str]] = []

    def interrupted(self: threading.Thread, timeout: float | None = None) -> None:
        if self.name.startswith("commits") and not told:
            told.append(names(store))
            raise KeyboardInterrupt
        commits.gate.set()
        join(self, timeout)

    commits.gate.clear()
    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(store, put_all)
    assert told == [[]]
    assert names(store) == ["layer 0", "layer 1", "layer 2"]


def test_of_a_commit_and_the_computation_that_fail_the_earlier_is_told(
    store: Store, commits: Commits, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits.errors = {"layer 0": full()}

    def compute(work: Work) -> None:
        put(work, work.missing[0])
        raise ZeroDivisionError

    with opening(commits, monkeypatch, "__exit__"), pytest.raises(StoreFullError) as raised:
        run(store, compute)
    assert raised.value.__notes__ == ["stage decompose, block 0, layer 0"]


def test_a_draft_that_fails_is_discarded_and_those_before_it_are_kept(
    store: Store, commits: Commits
) -> None:
    def compute(work: Work) -> None:
        put(work, work.missing[0])
        with work.draft(work.missing[1]) as draft:
            draft.put("u", np.zeros(3))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(store, compute)
    assert (names(store), drafts(store)) == (["layer 0"], [])


def test_nothing_is_kept_of_a_unit_whose_files_have_changed(store: Store, commits: Commits) -> None:
    asked = iter([None, None, StorageError("f was changed while it was in use")])

    def confirm(stage: str) -> None:
        error = next(asked)
        if error is not None:
            raise error

    session = Session(store, confirm=confirm)
    with pytest.raises(StorageError, match="was changed") as raised:
        session.run(Group("decompose", "block 0", units(4), put_all))
    assert raised.value.__notes__ == ["stage decompose, block 0, layer 2"]
    assert commits.begun == names(store) == ["layer 0", "layer 1"]
    assert drafts(store) == []


def test_attrs_that_are_not_json_end_the_group_and_are_named(
    store: Store, commits: Commits
) -> None:
    def compute(work: Work) -> None:
        for unit in work.missing:
            with work.draft(unit) as draft:
                draft.attrs["loss"] = float("nan") if unit.name == "layer 1" else 0.0

    with pytest.raises(ValueError, match=r"attrs\.loss is nan") as raised:
        run(store, compute)
    assert raised.value.__notes__ == ["stage decompose, block 0, layer 1"]
    assert (names(store), drafts(store)) == (["layer 0"], [])


def test_a_bucket_that_is_gone_ends_the_group_and_keeps_what_is_here(
    tmp_path: Path, commits: Commits
) -> None:
    objects = Faulty()
    store = machine(tmp_path, objects)
    objects.fails_at = "payload/"
    with pytest.raises(ObjectsError, match=r"cannot be reached\. What was computed") as raised:
        run(store, put_all)
    assert raised.value.__notes__ == ["stage decompose, block 0, layer 0"]
    assert sorted(manifest.unit for manifest in Store.manifests(store)) == ["layer 0"]
    objects.fails_at = ""
    again = run(store, put_all)
    assert [outcome.state for outcome in again] == ["cached", "computed", "computed"]
    assert names(store) == names(machine(tmp_path / "other", objects))


def test_what_units_took_is_counted_once(store: Store, commits: Commits) -> None:
    """All threads' seconds are in somebody's, and a commit's only in one unit's."""
    before = process_time()
    outcomes = run(store, put_all, 8)
    spent = process_time() - before
    assert 0 < sum(outcome.cpu_seconds or 0 for outcome in outcomes) <= spent


def test_what_a_crash_leaves_is_an_artifact_or_an_orphan(
    store: Store, commits: Commits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies while one commit is done, one goes on and one waits."""
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):
            commits.errors = {}

            def dying(self: Draft) -> None:
                if self.unit == "layer 1":
                    os._exit(9)
                commit(self)

            commit = Draft.commit
            monkeypatch.setattr(Draft, "commit", dying)
            run(store, put_all)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert names(store) == ["layer 0"]
    orphans = drafts(store)
    assert 1 <= len(orphans) <= 2
    assert collect_garbage(store, [], dry_run=True).orphans == sorted(orphans)
    assert [outcome.state for outcome in run(store, put_all)] == ["cached", *["computed"] * 2]
