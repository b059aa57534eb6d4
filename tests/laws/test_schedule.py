"""How long a run of several processes would take: bounds that no order of its groups can pass."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.runs.schedule import Processes, play
from tasks.engine.order import read_by, share_of_threads
from tasks.engine.units import Unit
from tasks.engine.work import Group
from tests.pipeline import pico

GROUPS = 9
Case = tuple[list[Group], dict[Group, float]]


def nothing(work: object) -> None:
    """What groups here compute."""


def made(reads: Sequence[Sequence[int]], strands: Sequence[str]) -> list[Group]:
    """Groups of one unit that read those of earlier ones, by number."""
    groups: list[Group] = []
    for number, (own, strand) in enumerate(zip(reads, strands, strict=True)):
        inputs = {str(i): groups[i].units[0] for i in own if i < number}
        unit = Unit("decompose", str(number), settings={}, inputs=inputs)
        groups.append(Group("decompose", str(number), [unit], nothing, strand=strand))
    return groups


@st.composite
def cases(draw: Any, chained: bool = True) -> Case:
    """Groups and what each takes; some are found and take nothing."""
    numbers = st.sets(st.integers(0, GROUPS - 2), max_size=3 if chained else 0)
    reads = [sorted(draw(numbers)) for _ in range(GROUPS)]
    first = draw(st.integers(0, GROUPS - 1))  # a strand without a break, as runs have them
    last = draw(st.integers(first, GROUPS - 1)) if chained else first
    groups = made(reads, ["s" if first <= i <= last else "" for i in range(GROUPS)])
    took = draw(st.lists(st.integers(0, 20), min_size=GROUPS, max_size=GROUPS))
    return groups, dict(zip(groups, map(float, took), strict=True))


def played(case: Case, count: int, threads: int = 1, cores: int | None = None) -> float:
    """Seconds; those of a case are of one thread, and two of them are twice as fast."""
    groups, took = case
    todo = {group: 1 for group, seconds in took.items() if seconds}
    processes = Processes(count, threads, cores)
    return play(groups, todo, lambda group, own: took.get(group, 0.0) / own, processes).seconds


def longest_chain(groups: Sequence[Group], took: Mapping[Group, float]) -> float:
    """Of what reads what, and the order in a strand."""
    of = {unit: group for group in groups for unit in group.units}
    ends: dict[Group, float] = {}
    for place, group in enumerate(groups):
        before = [of[unit] for unit in read_by([group]) if unit in of and of[unit] is not group]
        if group.strand:
            before += [g for g in groups[:place] if g.strand == group.strand]
        ends[group] = took.get(group, 0.0) + max((ends[g] for g in before), default=0.0)
    return max(ends.values())


@given(cases())
def test_one_process_takes_the_sum(case: Case) -> None:
    assert played(case, 1) == pytest.approx(sum(case[1].values()))
    assert played(case, 1, 4, cores=4) == pytest.approx(sum(case[1].values()) / 4)


@given(cases(), st.integers(1, 5))
def test_never_sooner_than_the_longest_chain_or_an_even_share(case: Case, count: int) -> None:
    found, whole = played(case, count), sum(case[1].values())
    assert found >= longest_chain(*case) - 1e-9
    assert found >= whole / count - 1e-9
    assert found <= whole + 1e-9


@given(cases(chained=False), st.integers(1, 5))
def test_of_what_does_not_hang_together_more_do_no_harm(case: Case, count: int) -> None:
    assert played(case, count + 1) <= played(case, count) + 1e-9


@given(cases(), st.integers(1, 5), st.integers(1, 4))
def test_processes_that_divide_threads_win_nothing_where_those_divide_the_work(
    case: Case, count: int, threads: int
) -> None:
    """Twice the threads are twice as fast here: the machine has no more to give."""
    found = played(case, count, threads, cores=threads)
    assert found >= sum(case[1].values()) / threads - 1e-9


def test_processes_that_divide_threads_win_where_those_do_not_divide_the_work() -> None:
    groups = made([[]] * 4, [""] * 4)
    todo = dict.fromkeys(groups, 5)

    def alone(group: Group, threads: int) -> float:
        return 1.0

    assert play(groups, todo, alone, Processes(1, 2, 2)).seconds == 4
    found = play(groups, todo, alone, Processes(2, 2, 2))
    assert (found.seconds, found.memory) == (2, 10)
    crowded = play(groups, todo, alone, Processes(4, 2, 2))
    assert crowded.seconds == 2  # each of four has half a thread


def test_a_strand_has_all_threads_and_others_go_on_beside_it() -> None:
    groups = made([[], [0], [0], [1, 2]], ["s", "s", "", ""])
    todo = dict.fromkeys(groups, 1)
    seen: list[tuple[str, int]] = []

    def took(group: Group, threads: int) -> float:
        seen.append((group.label, threads))
        return 12.0 / threads

    found = play(groups, todo, took, Processes(2, 4, 4))
    assert seen == [("0", 4), ("1", 4), ("2", 2), ("3", 2)]
    # 3 s; then six threads want to run on four: 3 s of the strand take 4.5, and 1.5 are left of 2
    assert found.seconds == pytest.approx(3 + 4.5 + 3 + 6)
    assert share_of_threads(1, 4, 1) == 1


def test_processes_of_fewer_threads_than_there_are_cores_have_cores_of_their_own() -> None:
    groups = made([[]] * 4, [""] * 4)
    case = groups, dict.fromkeys(groups, 6.0)
    assert [played(case, count, 1, cores=2) for count in (1, 2, 4)] == [24, 12, 12]
    assert played(case, 1, 8, cores=2) == 24 / 8  # as it was measured


@pytest.mark.parametrize("method", ["svd_llm", "saes_svd:prefix=block", "soco"])
def test_more_processes_never_take_longer_over_a_run(
    method: str, inputs: pico.Inputs, tmp_path: Any
) -> None:
    """Of one speed each; where each has less of a machine the more there are, they may."""
    pipeline, _, _ = pico.build(inputs.settings(tmp_path / "home", method=method))
    groups = pipeline.groups
    took = {group: float(3 + number % 5) for number, group in enumerate(groups)}
    found = [played((groups, took), count) for count in range(1, 9)]
    assert found[0] == pytest.approx(sum(took.values()))
    assert found == sorted(found, reverse=True)
    assert found[1] < found[0]
    assert found[-1] >= longest_chain(groups, took) - 1e-9
