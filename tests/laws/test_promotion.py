"""A lease and recorded moves in a registry that compares nothing: races and crashes, simulated."""

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count

import pytest

from tasks.promotion.lease import SECONDS, SKEW, TAG, HeldError, Lease, Surroundings, leased
from tasks.promotion.moves import (
    DONE,
    OVERTAKEN,
    PROMOTE,
    ROLLBACK,
    WITHDRAWN,
    lineage,
    make_move,
    promotion_of,
    read_history,
    rollback_of,
    settle,
    unsettled,
)


class Killed(BaseException):
    """Nothing of that process runs any more."""


@dataclass
class Registry:
    """Tags and aliases of one model, as everybody sees them at once."""

    name: str = "m"
    held: dict[str, str] = field(default_factory=dict)
    pointed: dict[str, int] = field(default_factory=dict)


class View:
    """One process's way to a registry; `step` comes before every reading and writing."""

    def __init__(self, registry: Registry, step: Callable[[bool], None] = lambda _: None) -> None:
        self.registry = registry
        self.name = registry.name
        self.step = step

    def tags(self) -> dict[str, str]:
        self.step(False)
        return dict(self.registry.held)

    def set_tag(self, name: str, value: str) -> None:
        self.step(True)
        self.registry.held[name] = value

    def delete_tag(self, name: str) -> None:
        self.step(True)
        self.registry.held.pop(name, None)

    def aliases(self) -> dict[str, int]:
        self.step(False)
        return dict(self.registry.pointed)

    def set_alias(self, alias: str, version: int | None) -> None:
        self.step(True)
        if version is None:
            self.registry.pointed.pop(alias, None)
        else:
            self.registry.pointed[alias] = version


def around(pid: int, **changes: object) -> Surroundings:
    now = [1000.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    values = {"clock": lambda: now[0], "sleep": sleep, "running": lambda _: True}
    return Surroundings(**(values | changes), host="here", pid=pid)  # type: ignore[arg-type]


def promote(view: View, version: int, where: Surroundings, wait: Callable[[], None] = lambda: None):
    """As the flow does it: what the gates were held against is read before the lease is taken."""
    before, after = promotion_of(version, "champion", view.aliases())
    wait()
    with leased(view, f"p{where.pid}", where) as lease:
        settle(lease)
        return make_move(lease, PROMOTE, "champion", before, after, who=f"p{where.pid}")


class Turns:
    """Lets one of several threads run at a time, and another one at every step, by a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.changed = threading.Condition()
        self.live: list[int] = []
        self.turn = -1

    def give(self) -> None:
        if self.live:
            self.turn = self.random.choice(self.live)
        self.changed.notify_all()

    def step(self, me: int) -> None:
        with self.changed:
            self.give()
            self.changed.wait_for(lambda: self.turn == me)

    def run(self, works: list[Callable[[], None]]) -> None:
        def begin(me: int, work: Callable[[], None]) -> None:
            with self.changed:
                self.changed.wait_for(lambda: self.turn == me)
            work()
            with self.changed:
                self.live.remove(me)
                self.give()

        self.live = list(range(len(works)))
        threads = [threading.Thread(target=begin, args=pair) for pair in enumerate(works)]
        for thread in threads:
            thread.start()
        with self.changed:
            self.give()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("contenders", [2, 3])
def test_of_promotions_at_once_one_wins_whatever_their_order(contenders: int) -> None:
    for seed in range(150):
        registry, turns = Registry(pointed={"champion": 1}), Turns(seed)
        won: list[int] = []
        lost: list[str] = []
        ready: list[int] = []

        def contend(
            me: int, registry=registry, turns=turns, won=won, lost=lost, ready=ready
        ) -> None:
            def wait_for_all() -> None:
                ready.append(me)
                while len(ready) < contenders:
                    turns.step(me)

            view = View(registry, lambda _: turns.step(me))
            here = around(me, sleep=lambda _: turns.step(me))
            try:
                promote(view, 2 + me, here, wait_for_all)
                won.append(2 + me)
            except HeldError as error:
                lost.append(str(error))

        turns.run([lambda me=me: contend(me) for me in range(contenders)])  # type: ignore[misc]
        assert len(won) == 1 and len(lost) == contenders - 1, (seed, won, lost)
        assert all("nothing was moved" in words for words in lost)
        assert registry.pointed == {"champion": won[0], "previous": 1}
        (record,) = read_history(registry.held)
        assert (record.move.target, record.ending) == (won[0], DONE)
        assert not [name for name in registry.held if name.startswith(TAG)]


def killed_at(number: int) -> Callable[[bool], None]:
    """Lets so many writes through; from then on nothing."""
    writes = count()

    def step(writing: bool) -> None:
        if (next(writes) if writing else 0) >= number or step.dead:  # type: ignore[attr-defined]
            step.dead = True  # type: ignore[attr-defined]
            raise Killed

    step.dead = False  # type: ignore[attr-defined]
    return step


def steps_of_a_promotion() -> int:
    writes = []
    view = View(Registry(pointed={"champion": 1}), lambda writing: writes.append(writing))
    promote(view, 2, around(1))
    return sum(writes)


def test_a_promotion_writes_what_the_next_test_counts_on() -> None:
    # its claim twice, the record, champion, previous, the ending, the lease away
    assert steps_of_a_promotion() == 7


@pytest.mark.parametrize("number", range(7))
@pytest.mark.parametrize("elsewhere", [False, True])
def test_killed_between_any_two_steps_it_is_healed_by_the_next(
    number: int, elsewhere: bool
) -> None:
    registry = Registry(pointed={"champion": 1})
    with pytest.raises(Killed):
        promote(View(registry, killed_at(number)), 2, around(1))
    assert registry.pointed["champion"] in (1, 2)
    moved = registry.pointed["champion"] == 2
    next_one = around(2, running=lambda pid: pid == 2)
    if elsewhere:  # on another machine only time tells that the holder is dead
        next_one = replace(next_one, host="there")
        if registry.held.keys() & {n for n in registry.held if n.startswith(TAG)}:
            with pytest.raises(HeldError, match="is being promoted by p1"):
                promote(View(registry), 3, next_one)
        next_one = replace(next_one, clock=lambda: 1001.0 + SECONDS + SKEW)
    view = View(registry)
    with leased(view, "p2", next_one) as lease:
        settle(lease)
    assert not unsettled(registry.held)
    assert registry.pointed == ({"champion": 2, "previous": 1} if moved else {"champion": 1})
    endings = [one.ending for one in read_history(registry.held)]
    assert endings == ([DONE] if moved else [WITHDRAWN] if number > 2 else [])
    promote(view, 3, next_one)
    assert registry.pointed == {"champion": 3, "previous": 2 if moved else 1}
    assert not [name for name in registry.held if name.startswith(TAG)]


def test_an_alias_moved_by_hand_meanwhile_is_left_alone() -> None:
    registry = Registry(pointed={"champion": 1})
    with pytest.raises(Killed):
        promote(View(registry, killed_at(3)), 2, around(1))
    registry.pointed["champion"] = 7
    with leased(View(registry), "p2", around(2, running=lambda pid: pid == 2)) as lease:
        settle(lease)
    assert registry.pointed == {"champion": 7}
    assert [one.ending for one in read_history(registry.held)] == [OVERTAKEN]


def test_a_lease_that_ended_moves_nothing() -> None:
    registry, now = Registry(pointed={"champion": 1}), [1000.0]
    slow = around(1, clock=lambda: now[0])
    with (
        pytest.raises(HeldError, match="ended before everything was done"),
        leased(View(registry), "p1", slow) as lease,
    ):
        now[0] += SECONDS  # as if the process had stood still
        make_move(
            lease, PROMOTE, "champion", *promotion_of(2, "champion", registry.pointed), who="p1"
        )
    assert registry.pointed == {"champion": 1}
    assert registry.held == {}


def test_a_lease_that_was_taken_away_moves_nothing() -> None:
    registry = Registry(pointed={"champion": 1})
    with (
        pytest.raises(HeldError),
        leased(View(registry), "p1", around(1)) as lease,
    ):
        registry.held.clear()
        lease.check()


def test_rolled_back_twice_it_goes_back_twice_and_no_further() -> None:
    view = View(Registry())
    for version in (1, 2, 3):
        promote(view, version, around(1))
    seen = []
    while True:
        ways = rollback_of(view.aliases(), read_history(view.tags()), [1, 2, 3])
        if ways is None:
            break
        with leased(view, "p", around(1)) as lease:
            make_move(lease, ROLLBACK, "champion", *ways, who="p")
        seen.append(dict(view.aliases()))
    assert seen == [{"champion": 2, "previous": 1}, {"champion": 1}]
    promote(view, 3, around(1))
    assert view.aliases() == {"champion": 3, "previous": 1}
    assert lineage(read_history(view.tags())) == [1, 3]


def test_a_deleted_version_is_passed_over_on_the_way_back() -> None:
    view = View(Registry())
    for version in (1, 2, 3, 4):
        promote(view, version, around(1))
    ways = rollback_of(view.aliases(), read_history(view.tags()), [1, 3, 4])
    assert ways is not None
    assert ways[1] == {"champion": 3, "previous": 1}


def test_a_challenger_that_becomes_champion_is_none_any_more() -> None:
    view = View(Registry(pointed={"champion": 1, "challenger": 2}))
    promote(view, 2, around(1))
    assert view.aliases() == {"champion": 2, "previous": 1}


def test_tags_of_others_are_no_records() -> None:
    tags = {"eigenpress.move.000001.x": "no JSON", "eigenpress.move.2.y": "{}", "owner": "me"}
    assert read_history(tags) == []


def test_a_lease_is_free_again_after_whatever_happens() -> None:
    registry = Registry()
    with pytest.raises(ZeroDivisionError), leased(View(registry), "p", around(1)) as lease:
        assert isinstance(lease, Lease)
        raise ZeroDivisionError
    assert registry.held == {}


def test_gates_held_against_another_champion_move_nothing() -> None:
    registry = Registry(pointed={"champion": 1})
    stale = promotion_of(3, "champion", registry.pointed)
    promote(View(registry), 2, around(1))
    with (
        pytest.raises(HeldError, match="champion of 'm' is version 2 by now and not version 1"),
        leased(View(registry), "p2", around(2)) as lease,
    ):
        make_move(lease, PROMOTE, "champion", *stale, who="p2")
    assert registry.pointed == {"champion": 2, "previous": 1}
    assert len(read_history(registry.held)) == 1
