"""Moves of aliases, each recorded before it is made: half-made ones are finished or withdrawn.

A record is a tag of its own and is never written again; how its move ended is another tag. So no
race loses one, and a record without an ending tells the next promotion what to put right.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import groupby
from typing import Any
from uuid import uuid4

from tasks.promotion.lease import HeldError, Lease
from tasks.promotion.registry import CHALLENGER, CHAMPION, PREVIOUS, RegistryModel

RECORD, ENDING = "eigenpress.move.", "eigenpress.moved."
DONE, WITHDRAWN, OVERTAKEN = "done", "withdrawn", "overtaken"
PROMOTE, ROLLBACK = "promote", "rollback"


@dataclass(frozen=True)
class Move:
    """One move of an alias, as it is recorded.

    Attributes:
        number: Place in the history, from 1.
        token: Drawn at random: two of one number are still two records.
        kind: "promote" or "rollback".
        alias: What is moved.
        before: Alias to version, None for none, of all that the move touches; its own alias first.
        after: The same, of what they become.
        who: Who moved it.
        when: ISO 8601, UTC.
        why: What the user said.
        gates: What the gates came to.
    """

    number: int
    token: str
    kind: str
    alias: str
    before: Mapping[str, int | None]
    after: Mapping[str, int | None]
    who: str
    when: str
    why: str = ""
    gates: Sequence[Mapping[str, Any]] = ()

    @property
    def name(self) -> str:
        """What its tags end in."""
        return f"{self.number:06d}.{self.token}"

    @property
    def source(self) -> int | None:
        """Where the alias was."""
        return self.before[self.alias]

    @property
    def target(self) -> int | None:
        """Where it goes."""
        return self.after[self.alias]


@dataclass(frozen=True)
class Recorded:
    """A move and how it ended: "done", "withdrawn", "overtaken", or "" where it has not."""

    move: Move
    ending: str


def read_history(tags: Mapping[str, str]) -> list[Recorded]:
    """All moves that a model's tags record, in order; what is no record of ours is left out."""
    found = []
    for name, text in tags.items():
        if name.startswith(RECORD):
            try:
                move = Move(**json.loads(text))
                ending = tags.get(ENDING + move.name, "")
            except (ValueError, TypeError):
                continue
            found.append(Recorded(move, ending))
    return sorted(found, key=lambda recorded: recorded.move.name)


def lineage(history: Iterable[Recorded], alias: str = CHAMPION) -> list[int]:
    """The versions that an alias stands on, the present one last: promotions add, rollbacks take.

    A version that the alias was moved to by hand is in it as soon as a move begins there.
    """
    stack: list[int] = []
    for recorded in history:
        move = recorded.move
        if move.alias != alias or recorded.ending != DONE or move.target is None:
            continue
        if move.source is not None and (not stack or stack[-1] != move.source):
            stack.append(move.source)
        if move.kind == ROLLBACK:
            _cut(stack, move.target)
        elif not stack or stack[-1] != move.target:
            stack.append(move.target)
    return stack


def _cut(stack: list[int], target: int) -> None:
    """Takes versions away until the target is the last."""
    if target in stack:
        while stack[-1] != target:
            stack.pop()
    else:
        stack[:] = [target]


def promotion_of(
    version: int, alias: str, aliases: Mapping[str, int]
) -> tuple[dict[str, int | None], dict[str, int | None]]:
    """What a promotion touches, before and after; the champion's alias takes `previous` along.

    A challenger that becomes champion is no challenger any more.
    """
    touched = {alias: aliases.get(alias)}
    after: dict[str, int | None] = {alias: version}
    if alias == CHAMPION:
        touched[PREVIOUS] = aliases.get(PREVIOUS)
        after[PREVIOUS] = aliases.get(CHAMPION)
        if aliases.get(CHALLENGER) == version:
            touched[CHALLENGER], after[CHALLENGER] = version, None
    return touched, after


def rollback_of(
    aliases: Mapping[str, int], history: Sequence[Recorded], versions: Iterable[int]
) -> tuple[dict[str, int | None], dict[str, int | None]] | None:
    """What a rollback touches, before and after; None where nothing is before the champion.

    The champion goes to `previous`, and `previous` one further back along the history. Versions
    that were deleted are passed over.
    """
    there = set(versions)
    stack = [version for version, _ in groupby(v for v in lineage(history) if v in there)]
    champion, target = aliases.get(CHAMPION), aliases.get(PREVIOUS)
    if champion is None or target is None or target == champion:
        return None
    _cut(stack, target)
    before: dict[str, int | None] = {CHAMPION: champion, PREVIOUS: target}
    return before, {CHAMPION: target, PREVIOUS: stack[-2] if len(stack) > 1 else None}


def make_move(
    lease: Lease,
    kind: str,
    alias: str,
    before: Mapping[str, int | None],
    after: Mapping[str, int | None],
    *,
    who: str,
    why: str = "",
    gates: Sequence[Mapping[str, Any]] = (),
) -> Move:
    """Records a move, makes it, reads it back and records that it is done.

    Raises:
        HeldError: Somebody else has moved an alias; or the lease ended.
    """
    model = lease.model
    number = 1 + max((one.move.number for one in read_history(model.tags())), default=0)
    when = datetime.now(UTC).isoformat(timespec="seconds")
    move = Move(
        number, uuid4().hex[:12], kind, alias, dict(before), dict(after), who, when, why, gates
    )
    lease.check()
    _expect(model, before, "nothing was moved")
    model.set_tag(RECORD + move.name, json.dumps(asdict(move), ensure_ascii=False))
    _apply(lease, move)
    lease.check()
    _expect(model, after, "somebody moves aliases by other means; see `eigenpress history`")
    model.set_tag(ENDING + move.name, DONE)
    return move


def _apply(lease: Lease, move: Move) -> None:
    """The alias itself first, then those that go along."""
    aliases = lease.model.aliases()
    for alias, version in move.after.items():
        if aliases.get(alias) != version:
            lease.check()
            lease.model.set_alias(alias, version)


def _expect(model: RegistryModel, wanted: Mapping[str, int | None], rest: str) -> None:
    there = model.aliases()
    for alias, version in wanted.items():
        if there.get(alias) != version:
            raise HeldError(
                f"{alias} of {model.name!r} is {_version(there.get(alias))} by now and not "
                f"{_version(version)}, by another promotion: {rest}"
            )


def _version(version: int | None) -> str:
    return "no version" if version is None else f"version {version}"


def unsettled(tags: Mapping[str, str]) -> list[Move]:
    """Moves that were begun and have no ending: of a promotion that goes on, or was killed."""
    return [one.move for one in read_history(tags) if not one.ending]


def settle(lease: Lease, tell: Callable[[str], None] = lambda line: None) -> None:
    """Finishes or withdraws what a killed promotion left half-made.

    Where its alias had been moved the rest of the move is made; where it had not, nothing had
    been, and the record says so. An alias that was moved elsewhere since is left alone.

    Args:
        lease: The lease, so that whoever wrote the record is not at it any more.
        tell: Told what was put right.
    """
    model = lease.model
    for move in unsettled(model.tags()):
        lease.check()
        now = model.aliases().get(move.alias)
        if now == move.target:
            _apply(lease, move)
            ending, said = DONE, "had moved its alias: the rest is done now"
        elif now == move.source:
            ending, said = WITHDRAWN, "had moved nothing: it is withdrawn"
        else:
            ending, said = OVERTAKEN, "was overtaken by a move by other means: left alone"
        model.set_tag(ENDING + move.name, ending)
        tell(f"{move.kind} {move.number} by {move.who} was cut short and {said}")
