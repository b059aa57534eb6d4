"""When processes that compute a run would have ended, were every group to take what is estimated.

What is sent when is decided as in hands.py, by the same rules.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from flows.server.workers import AHEAD
from tasks.engine.order import Waiting, share_of_threads
from tasks.engine.units import Unit
from tasks.engine.work import Group

Seconds = Callable[[Group, int], float]


@dataclass(frozen=True)
class Processes:
    """Who computes.

    Attributes:
        count: How many processes.
        threads: That a process has which computes alone.
        cores: Of the one machine whose threads they divide; None where each has its own.
    """

    count: int
    threads: int
    cores: int | None = None

    def threads_of(self, groups: int) -> int:
        """Threads for an order of so many groups."""
        alone = self.cores is None
        return self.threads if alone else share_of_threads(self.threads, self.count, groups)

    def slower(self, wanted: int) -> float:
        """By what everything takes longer while so many threads want to run."""
        if self.cores is None:
            return 1.0
        return max(1.0, wanted / max(self.cores, self.threads))  # one alone is as fast as measured


@dataclass(frozen=True)
class Played:
    """How it went.

    Attributes:
        seconds: From the first group to the end of the last one.
        memory: Bytes that the groups in hand took together at most.
    """

    seconds: float
    memory: int


@dataclass
class _Order:
    """What one process has in hand.

    Attributes:
        groups: The one that it is at, and those that it has yet to do.
        threads: That it has.
        left: Seconds that the one it is at will take yet.
    """

    groups: deque[Group]
    threads: int
    left: float


def play(
    groups: Sequence[Group], todo: Mapping[Group, int], seconds: Seconds, processes: Processes
) -> Played:
    """Lets processes compute groups.

    Args:
        groups: Of a run, in order; what they read is among them.
        todo: Those that are not found, and the bytes that each takes.
        seconds: What a group takes with so many threads, if no other process has any of them.
        processes: Who computes; a group is done where it was begun.
    """
    waiting, done = Waiting(groups), set[Unit]()
    sent: deque[list[Group]] = deque()
    at: list[_Order] = []
    clock, most = 0.0, 0
    while True:
        _send(waiting, done, todo, sent, AHEAD * processes.count - len(at))
        while sent and len(at) < processes.count:
            order = sent.popleft()
            threads = processes.threads_of(len(order))
            at.append(_Order(deque(order), threads, seconds(order[0], threads)))
        if not at:
            break
        most = max(most, sum(todo.get(order.groups[0], 0) for order in at))
        step = min(order.left for order in at)
        clock += step * processes.slower(sum(order.threads for order in at))
        at = [order for order in at if _goes_on(order, step, done, seconds)]
    assert not len(waiting), "a group reads what no group makes"
    return Played(clock, most)


def _send(
    waiting: Waiting,
    done: set[Unit],
    todo: Mapping[Group, int],
    sent: deque[list[Group]],
    room: int,
) -> None:
    """Sends what is ready; cached groups at the beginning of a strand are found before."""
    while len(sent) < room and (strand := waiting.take(done)) is not None:
        left = deque(strand)
        while left and left[0] not in todo:
            done.update(left.popleft().units)
        if left:
            sent.append(list(left))


def _goes_on(order: _Order, step: float, done: set[Unit], seconds: Seconds) -> bool:
    """Whether a process still has something in hand, ``step`` seconds of its work later."""
    order.left -= step
    if order.left > 0:
        return True
    done.update(order.groups.popleft().units)
    if order.groups:
        order.left = seconds(order.groups[0], order.threads)
    return bool(order.groups)
