"""Who may move the aliases of a model: a lease in its tags, for a registry that compares nothing.

Lamport's bakery ("A New Solution of Dijkstra's Concurrent Programming Problem", 1974): everybody
writes only a tag of their own. One says that it is choosing, reads all tags, takes a number above
every other, says so, and reads again: whoever has the lowest number holds the lease. A tag that
is written after that second reading gets a higher number, because its writer has read this one.

A lease ends by itself. Clocks decide that only where the holder is on another machine (they may
differ by `SKEW`); of a process of this machine it is asked whether it still runs.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from uuid import uuid4

from storage.hosts import runs, this_host
from tasks.promotion.registry import RegistryModel

TAG = "eigenpress.lease."
SECONDS = 60.0  # that a lease lasts
SKEW = 30.0  # seconds that clocks of different machines may differ
MARGIN = 15.0  # seconds before its end in which nothing new is begun
CHOOSING_SECONDS = 10.0  # that somebody is waited for who is choosing


class HeldError(RuntimeError):
    """Another promotion holds the lease, or has moved the alias meanwhile; nothing was moved."""


@dataclass(frozen=True)
class Claim:
    """What a tag says of its writer.

    Attributes:
        token: Its own, drawn at random.
        number: Its place in the queue; 0 while it is choosing.
        who: For people.
        host: The machine, its start and the space of its process ids.
        pid: The process.
        ends: Seconds since 1970.
    """

    token: str
    number: int
    who: str
    host: str
    pid: int
    ends: float


@dataclass(frozen=True)
class Surroundings:
    """What a lease asks of the machine.

    Attributes:
        clock: Seconds since 1970.
        sleep: Waits for some seconds.
        running: Whether a process of this host is there.
        host: This host.
        pid: This process.
    """

    clock: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep
    running: Callable[[int], bool] = runs
    host: str = field(default_factory=this_host)
    pid: int = field(default_factory=os.getpid)


class Lease:
    """A lease that is held.

    Args:
        model: The registered model.
        claim: What its tag says.
        around: The machine.
    """

    def __init__(self, model: RegistryModel, claim: Claim, around: Surroundings) -> None:
        self.model = model
        self.claim = claim
        self.around = around

    def check(self) -> None:
        """Before every step: refuses to begin it when the lease is about to end, or has gone.

        Raises:
            HeldError: The lease is not safely held any more.
        """
        late = self.around.clock() > self.claim.ends - MARGIN
        if late or TAG + self.claim.token not in self.model.tags():
            raise HeldError(
                f"the lease on {self.model.name!r} ended before everything was done (this process "
                "stood still, or the registry was slow); the same command again finishes it"
            )


@contextmanager
def leased(model: RegistryModel, who: str, around: Surroundings | None = None) -> Iterator[Lease]:
    """The lease on a registered model, for as long as it takes.

    Args:
        model: The registered model.
        who: Who asks, for people.
        around: The machine; another one for tests.

    Raises:
        HeldError: Somebody else holds it.
    """
    around = around or Surroundings()
    ends = around.clock() + SECONDS
    claim = Claim(uuid4().hex[:16], 0, who, around.host, around.pid, ends)
    _write(model, claim)
    try:
        number = 1 + max((one.number for one in _claims(model, around).values()), default=0)
        claim = Claim(**{**asdict(claim), "number": number})
        _write(model, claim)
        _wait_for_turn(model, claim, around)
        yield Lease(model, claim, around)
    finally:
        with suppress(Exception):  # it ends by itself
            model.delete_tag(TAG + claim.token)


def _wait_for_turn(model: RegistryModel, claim: Claim, around: Surroundings) -> None:
    """Returns when this claim is the first of all, raises when it is not.

    Raises:
        HeldError: Another one is before it.
    """
    until = around.clock() + CHOOSING_SECONDS
    while True:
        claims = _claims(model, around)
        if claims.get(claim.token, claim).number != claim.number or claim.token not in claims:
            raise HeldError(f"the lease on {model.name!r} was taken away; nothing was moved")
        others = [other for token, other in claims.items() if token != claim.token]
        first = [o for o in others if o.number > 0 and (o.number, o.token) < _place(claim)]
        if first:
            raise HeldError(_held_by(model, min(first, key=_place), around))
        choosing = [other for other in others if other.number == 0]
        if not choosing:
            return
        if around.clock() > until:
            raise HeldError(_held_by(model, choosing[0], around))
        around.sleep(0.05)


def _place(claim: Claim) -> tuple[int, str]:
    return claim.number, claim.token


def _held_by(model: RegistryModel, other: Claim, around: Surroundings) -> str:
    left = max(0.0, other.ends + SKEW - around.clock())
    return (
        f"{model.name!r} is being promoted by {other.who} at this moment; nothing was moved. If "
        f"that process is gone, the same command works in {left:.0f} s"
    )


def _write(model: RegistryModel, claim: Claim) -> None:
    model.set_tag(TAG + claim.token, json.dumps(asdict(claim)))


def _claims(model: RegistryModel, around: Surroundings) -> dict[str, Claim]:
    """All claims that count, this one's among them; those of the dead are taken away."""
    found: dict[str, Claim] = {}
    for name, text in model.tags().items():
        if not name.startswith(TAG):
            continue
        claim = read_claim(text)
        if claim is None or _is_over(claim, around):
            model.delete_tag(name)
        else:
            found[claim.token] = claim
    return found


def read_claim(text: str) -> Claim | None:
    """What a tag says; None where it says nothing."""
    try:
        fields: Mapping[str, object] = json.loads(text)
        claim = Claim(**fields)  # type: ignore[arg-type]
        return claim if isinstance(claim.number, int) and claim.ends > 0 else None
    except (ValueError, TypeError):
        return None


def _is_over(claim: Claim, around: Surroundings) -> bool:
    if claim.host == around.host:
        return not around.running(claim.pid) or around.clock() > claim.ends
    return around.clock() > claim.ends + SKEW
