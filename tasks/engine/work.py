"""Groups of units that are computed together, and what their computation is given."""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from storage.artifact import Artifact
from storage.draft import Draft
from storage.keys import recipe_key
from tasks.engine.stages import STAGES
from tasks.engine.units import Outcome, Unit
from tasks.engine.writer import Writer

if TYPE_CHECKING:
    from tasks.engine.session import Session

SECONDS, CPU_SECONDS = "seconds", "cpu_seconds"
"""Of an artifact's circumstances: how long it took, and what all threads of the process spent.

Both from when the unit before was handed over to be committed until this one was. A commit goes on
beside what is computed next: it takes that one's time only where it is waited for, its processor's
seconds are among that one's, and those of a group's last units are on nobody's record.
"""
SESSION, COMMAND = "session", "command"  # which one made it, of all that work with a store
ONCE = "once"  # in the recipe of what cannot be made again


class Interrupted(Exception):
    """Ends the work of a group whose command was told to stop."""


class Group:
    """Units that are computed together, in one Prefect task.

    Args:
        stage: Name of their stage.
        label: What the group is about ("block 3").
        units: The units, at least one.
        compute: Computes and commits the units of ``work.missing``; its code is part of theirs.
        after: Called when all units are there, cached or not, with the recipe of the last one.
        line: What people are shown it under, where that is not its stage's own line.
        strand: Names what hands something on in memory from group to group, so that all of them
            belong in one process, in order; "" for a group that needs nothing but its inputs.
    """

    def __init__(
        self,
        stage: str,
        label: str,
        units: Sequence[Unit],
        compute: Callable[["Work"], None],
        after: Callable[["Session", Mapping[str, Any]], None] | None = None,
        line: str | None = None,
        strand: str = "",
    ) -> None:
        self.strand = strand
        self.line = line or STAGES[stage].line or stage
        self.stage = stage
        self.label = label
        self.units = tuple(units)
        self.compute = compute
        for unit in self.units:
            unit.code = (*unit.code, compute)
        self.after = after


@dataclass
class Work:
    """What a group's ``compute`` is given: the units to do and the means to do them.

    Attributes:
        outcomes: What became of units that were found, and of all once they are computed.
        drafting: The unit whose draft is open.
        writer: Commits drafts whose block has ended, while the computation goes on.
    """

    session: "Session"
    group: Group
    outcomes: dict[Unit, Outcome] = field(default_factory=dict)
    missing: list[Unit] = field(default_factory=list)
    keys: dict[Unit, str] = field(default_factory=dict)
    recipes: dict[Unit, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[Unit, float] = field(default_factory=dict)
    drafting: Unit | None = None
    writer: Writer = field(default_factory=Writer)
    _mark: float = field(default_factory=perf_counter)
    _cpu_mark: float = field(default_factory=process_time)

    @property
    def place(self) -> str:
        """Stage, group and unit in hand; before its draft is open, the next one that is missing.

        Where a commit has failed it is that one's unit.
        """
        place = f"stage {self.group.stage}, {self.group.label}"
        waiting = [unit for unit in self.missing if unit not in self.seconds]
        known = self.writer.failed or self.drafting
        unit = known or next(iter(waiting), None)
        if unit is None or unit.name == self.group.label:
            return place
        return f"{place}, {unit.name}{'' if known or len(waiting) == 1 else ' or later'}"

    def add(self, unit: Unit, key: str, recipe: dict[str, Any]) -> None:
        """Puts a unit on the list."""
        self.missing.append(unit)
        self.keys[unit] = key
        self.recipes[unit] = recipe
        self._mark, self._cpu_mark = perf_counter(), process_time()

    def unrepeatable(self, unit: Unit) -> None:
        """Keeps a unit under a key that nobody will look for: it read what its recipe lacks."""
        self.recipes[unit] = self.recipes[unit] | {ONCE: uuid4().hex}
        self.keys[unit] = recipe_key(self.recipes[unit])

    def artifact(self, unit: Unit) -> Artifact:
        """The artifact of an upstream unit."""
        return self.session.artifact(unit)

    def progress(self, done: int, total: int, detail: str = "") -> None:
        """Tells the listener how far the group is, and where it stands in a word.

        Raises:
            Interrupted: The command was told to stop.
            BaseException: A commit has failed, so.
        """
        if self.session.stopping.is_set():
            raise Interrupted
        self.writer.check()
        label = f"{self.group.stage} {self.group.label}"
        self.session.listener(f"{label} {detail}" if detail else label, done, total)

    def draft(self, unit: Unit) -> AbstractContextManager[Draft]:
        """A draft that becomes the unit's artifact when its block has ended without an error.

        That goes on beside what is computed next. Whoever asks the session for the unit, or for its
        store, waits for it; all of a group's are there when it ends.
        """
        return _Commit(self, unit)

    def elapsed(self) -> tuple[float, float]:
        """Seconds since the group's last unit was handed over, and the processor's."""
        now, cpu = perf_counter(), process_time()
        seconds, self._mark = now - self._mark, now
        spent, self._cpu_mark = cpu - self._cpu_mark, cpu
        return seconds, spent


class _Commit(AbstractContextManager[Draft]):
    def __init__(self, work: Work, unit: Unit) -> None:
        self.work = work
        self.unit = unit
        session = work.session
        manifests = {up: session.manifest(up) for up in unit.upstream.values()}
        self.draft = session.store_now.draft(
            key=work.keys[unit],
            stage=unit.stage,
            unit=unit.name,
            recipe=work.recipes[unit],
            inputs={
                role: {"key": manifests[up].key, "digest": manifests[up].digest}
                for role, up in unit.upstream.items()
            },
        )

    def __enter__(self) -> Draft:
        self.work.drafting = self.unit
        self.opened = self.draft.__enter__()
        self.opened.info.update(self.work.session.info)
        return self.opened

    def __exit__(self, *error: Any) -> None:
        if error[0] is not None:
            self.draft.__exit__(*error)
            return
        work, session, opened = self.work, self.work.session, self.opened
        try:
            session.confirm(self.unit.stage)
            seconds, spent = work.elapsed()
            opened.info |= {SECONDS: seconds, CPU_SECONDS: spent}
            opened.info |= {SESSION: session.name, COMMAND: session.command}
            # what the computation goes on to change is not what was kept
            opened.attrs, opened.info = deepcopy(opened.attrs), deepcopy(opened.info)
            work.writer.make_room()
        except BaseException:
            self.draft.__exit__(*sys.exc_info())
            raise
        work.writer.take(self.unit, self._commit, self._discard)
        work.seconds[self.unit] = seconds
        work.drafting = None

    def _commit(self) -> None:
        self.draft.__exit__(None, None, None)
        self.work.session.done(self.unit, self.opened.manifest)

    def _discard(self, error: BaseException) -> None:
        with suppress(BaseException):  # what is raised is that error again
            self.draft.__exit__(type(error), error, error.__traceback__)
