"""Leases in a bucket whose requests come in any order, one at a time."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import hypothesis.strategies as st
from hypothesis import given, settings

from storage.bucket_leases import LEASE_SECONDS, BucketLeases
from storage.errors import LeaseHeldError
from storage.leases import Claim
from storage.objects import Object
from tests.contracts.buckets import Faulty
from tests.contracts.leases import NEVER, STAGE, Clock, X, holds

Choose = Callable[[list[str]], str]
"""Whose turn it is, of these."""


class Turns(Faulty):
    """Objects whose every request waits until the thread that makes it is given a turn."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.go: dict[str, threading.Semaphore] = {}
        self.stopped = threading.Semaphore(0)
        self.backwards = False

    def _step(self) -> None:
        if (go := self.go.get(threading.current_thread().name)) is not None:
            self.stopped.release()
            go.acquire()

    def create(self, name: str, data: bytes) -> bool:
        self._step()
        return super().create(name, data)

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        self._step()
        return super().read(name, start, length)

    def list(self, below: str) -> Iterator[Object]:
        self._step()
        return iter(list(super().list(below)))

    def delete(self, names: Sequence[str]) -> None:
        for name in reversed(names) if self.backwards else names:  # a bucket's order is its own
            self._step()
            super().delete([name])

    def run(self, works: dict[str, Callable[[], None]], choose: Choose) -> None:
        """Run all to their ends, a request at a time, in the order that is chosen."""
        left = set(works)

        def whole(name: str, work: Callable[[], None]) -> None:
            self._step()
            try:
                work()
            finally:
                left.discard(name)
                self.stopped.release()

        self.go = {name: threading.Semaphore(0) for name in works}
        for name, work in works.items():
            threading.Thread(target=whole, args=(name, work), name=name, daemon=True).start()
            self.stopped.acquire()
        while left:
            self.go[choose(sorted(left))].release()
            self.stopped.acquire()
        self.go = {}


@contextmanager
def alone(inside: list[str], name: str, claim: Claim) -> Iterator[None]:
    inside.append(name)
    assert inside == [name]
    yield
    inside.remove(name)
    claim.give_back()


def take_and_give_back(choose: Choose, dead: int, backwards: bool) -> None:
    """Three machines that all watched the dead ones want a key, three times each."""
    objects, clock = Turns(), Clock()
    objects.backwards = backwards
    for number in range(dead):
        objects.create(f"leases/{STAGE}/{X}/{number + 1}", b"")
    inside: list[str] = []
    failed: list[BaseException] = []
    outcomes: list[bool] = []

    def work(name: str, leases: BucketLeases) -> None:
        try:
            for _ in range(3):
                try:
                    claim = leases.claim(STAGE, [X])
                except LeaseHeldError:
                    outcomes.append(False)
                    continue
                outcomes.append(True)
                with alone(inside, name, claim):
                    objects._step()
        except BaseException as error:
            failed.append(error)

    works: dict[str, Callable[[], None]] = {}
    for name in "abc":
        leases = BucketLeases(objects, clock, name, NEVER)
        assert holds(leases, X) is (dead == 0)
        works[name] = partial(work, name, leases)
    clock.now += LEASE_SECONDS
    objects.run(works, choose)
    assert failed == []
    assert any(outcomes)
    assert objects.names() == []


@settings(max_examples=40, deadline=None)
@given(data=st.data(), dead=st.integers(0, 2), backwards=st.booleans())
def test_in_any_order_one_at_a_time_holds_it(
    data: st.DataObject, dead: int, backwards: bool
) -> None:
    take_and_give_back(lambda left: data.draw(st.sampled_from(left)), dead, backwards)
