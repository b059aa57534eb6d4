"""Who computes the groups of a run: this process, one after another, or others, several at once."""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Protocol, cast
from uuid import UUID

import torch

from flows.report.console import Reporter
from flows.runs.inside import Reading
from flows.runs.notes import Notes
from flows.runs.pipeline import Pipeline
from flows.runs.worker import Done, run_order
from flows.server.workers import WorkerError, Workers
from flows.settings.config import Settings
from flows.settings.heap import give_back
from tasks.engine.order import Order, Waiting, places_of, read_by, share_of_threads
from tasks.engine.peak_memory import Peak
from tasks.engine.prefect_task import run_group
from tasks.engine.session import Session
from tasks.engine.units import Outcome
from tasks.engine.work import Group

LOOK_SECONDS = 0.5  # between looks at how far the groups of a strand are
TRIES = 3  # of groups whose process ends in the middle
LOST = "a process that computed ended in the middle; another one goes on with its work"


class Hands(Protocol):
    """They compute the groups of one run."""

    def outcomes(self, group: Group) -> list[Outcome]:
        """What became of a group's units; groups are asked for in the run's order."""


class Here:
    """This process, group after group, each as one Prefect task.

    Args:
        session: The run.
    """

    def __init__(self, session: Session) -> None:
        self.session = session

    def outcomes(self, group: Group) -> list[Outcome]:
        """Finds or computes a group."""
        future = run_group.submit(group.stage, group.label, self.session, group)
        done = cast(list[Outcome], future.result())  # what the state holds, not the state
        if any(outcome.state == "computed" for outcome in done):
            give_back()
        return done


class Elsewhere:
    """Other processes: a group is sent as soon as all that it reads is in the store.

    Groups of one strand are sent together; what they have put into the store so far is found by
    looking. What is cached is found here.

    Args:
        pipeline: The run, which the other processes build again.
        groups: Those of its groups that are asked for.
        session: The run, here.
        workers: Who computes.
        settings: The command's configuration, as they are to open it.
        notes: Gets what they want people to know.
        reporter: Told, in a stage, how far they are and how much memory they took for it.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        groups: Sequence[Group],
        session: Session,
        workers: Workers,
        settings: Settings,
        notes: Notes,
        reporter: Reporter,
    ) -> None:
        self.pipeline, self.session, self.workers = pipeline, session, workers
        self.settings, self.notes, self.reporter = settings, notes, reporter
        self.here = Here(session)
        self._numbers = {group: number for number, group in enumerate(pipeline.groups)}
        self._places = places_of(pipeline.groups)
        self._waiting = Waiting(groups)
        self._strand: dict[Group, tuple[Group, ...]] = {}  # of those that were begun
        self._out: dict[int, list[Group]] = {}  # number of the first group, as it was sent
        self._runs: dict[int, UUID] = {}  # the same to its task's run
        self._reading = Reading(self._tell)
        self._lost: Counter[int] = Counter()
        self._ended: SimpleQueue[tuple[int, Callable[[], Done]]] = SimpleQueue()
        self._done: dict[Group, list[Outcome]] = {}
        self._peaks: dict[Group, Peak] = {}

    def outcomes(self, group: Group) -> list[Outcome]:
        """Waits for a group; meanwhile all workers have something to do."""
        while group not in self._done:
            self._hand_out()
            if group not in self._done:
                assert self._out, f"nothing makes what {group.stage} {group.label} reads"
                self._await()
                self._show(group.line)
        if group in self._peaks:  # of what was computed while another stage was in hand, too
            self.reporter.elsewhere(self._peaks.pop(group))
        return self._done.pop(group)

    def _hand_out(self) -> None:
        """Sends what is ready, as long as there is somebody for it."""
        while len(self._out) < self.workers.at_once:
            strand = self._waiting.take(self.session.manifests)
            if strand is None:
                return
            self._strand |= dict.fromkeys(strand, tuple(strand))
            self._begin(strand)

    def _begin(self, strand: list[Group]) -> None:
        """Finds the cached groups at the beginning of a strand, and sends the rest."""
        left = deque(strand)
        while left and not self.session.absent(left[0]):
            group = left.popleft()
            self._done[group] = self.here.outcomes(group)
        if left:
            self._send(list(left))

    def _send(self, groups: list[Group]) -> None:
        before = [group for group in self._strand[groups[0]] if group not in groups]
        read = read_by(groups, before)
        inputs = {self._places[unit]: self.session.manifests[unit].key for unit in read}
        numbers = tuple(self._numbers[group] for group in groups)
        order = Order(
            self.settings,
            self.pipeline.config,
            numbers,
            self.session.name,
            self.session.command,
            inputs,
            self._threads(len(groups)),
        )
        label = groups[0].label + (f" to {groups[-1].label}" if len(groups) > 1 else "")
        self._out[numbers[0]] = groups
        self._runs[numbers[0]] = self.workers.submit(
            run_order,
            {"line": groups[0].line, "label": label, "order": order},
            lambda result: self._ended.put((numbers[0], result)),
        )

    def _threads(self, groups: int) -> int | None:
        """Of this machine's; a cluster's processes know their own."""
        if self.workers.cluster is not None:
            return None
        return share_of_threads(torch.get_num_threads(), self.workers.count, groups)

    def _await(self) -> None:
        """Waits until something ends, and looks now and then how far strands are."""
        try:
            first, result = self._ended.get(timeout=LOOK_SECONDS)
        except Empty:
            self._look()
            return
        try:
            done = result()
        except WorkerError:
            self._lost[first] += 1
            if self._lost[first] == TRIES:
                raise
            self._tell(LOST)  # once, of all that its end took along
            self._send([group for group in self._out.pop(first) if not self._has(group)])
            return
        for note in done.notes:
            self._tell(note)
        for group, made in zip(self._out.pop(first), done.outcomes, strict=True):
            self._peaks[group] = done.peaks[group.line]  # the last one is yet to be asked for
            if not self._has(group):
                self.session.settle(group, made)
                self._done[group] = made

    def _tell(self, note: str) -> None:
        if note not in self.notes:
            self.notes.add(note)

    def _look(self) -> None:
        """Takes over what strands have put into the store, group by group."""
        for groups in self._out.values():
            for group in groups[:-1]:  # the last one's process has yet to end
                if self._has(group):
                    continue
                outcomes = self.session.standing(group)
                if outcomes is None:
                    break
                self._done[group] = outcomes

    def _show(self, line: str) -> None:
        """Tells how far those groups of a stage are that are done, but for their turn, or begun."""
        units = float(sum(len(group.units) for group in self._done if group.line == line))
        labels = []
        found = self._reading.of([self._runs[first] for first in self._out])
        for first, groups in self._out.items():
            group = next((group for group in groups if not self._has(group)), None)
            inside = found.get(self._runs[first])
            if group is None or inside is None or group.line != line:
                continue
            if f"{inside.label} ".startswith(f"{group.stage} {group.label} "):  # not one before it
                units += inside.share * len(group.units)
                labels.append(inside.label)
        self.reporter.beside(labels, units)

    def _has(self, group: Group) -> bool:
        return all(unit in self.session.manifests for unit in group.units)
