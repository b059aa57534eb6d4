"""How far other processes are inside groups: they write it to Prefect, the command reads it."""

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.context import TaskRunContext

from flows.report.console import Reporter
from flows.runs import inside as inside_module
from flows.runs.hands import Elsewhere
from flows.runs.inside import Inside, Reading, Telling
from flows.runs.notes import Notes
from flows.settings.config import RunConfig
from tasks.engine.session import Session
from tests.pipeline import pico


def test_what_one_task_run_tells_is_read_by_its_name(
    server_environment: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inside_module, "EVERY", 0.0)
    notes: list[str] = []
    found: list[dict[UUID, Inside]] = []

    @task(cache_policy=NO_CACHE, persist_result=False)
    def order(label: str) -> UUID:
        context = TaskRunContext.get()
        assert context is not None
        own, tell = context.task_run.id, Telling(notes.append)
        for done in (1, 3):  # the second goes over the first
            tell(f"learn {label}", done, 4)
            found.append(Reading(notes.append).of([own]))
        return own

    @flow(persist_result=False)
    def command() -> list[UUID]:
        return [order("block 1"), order("block 2")]

    with pico.environment(server_environment):
        first, second = command()
        both = Reading(notes.append).of([first, second, uuid4()])
        assert Reading(notes.append).of([]) == {}
    assert notes == []
    assert [own[run].share for own, run in zip(found, [first] * 2, strict=False)] == [0.25, 0.75]
    assert both == {
        first: Inside("learn block 1  3/4", 0.75),
        second: Inside("learn block 2  3/4", 0.75),
    }


def test_what_takes_no_time_tells_nothing_and_a_prefect_that_takes_nothing_is_told_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[float] = []

    def refuse(share: float, **_: object) -> None:
        asked.append(share)
        raise OSError("no room\nfor more")

    monkeypatch.setattr("prefect.artifacts.create_progress_artifact", refuse)
    notes: list[str] = []
    monkeypatch.setattr(inside_module, "EVERY", float("inf"))
    Telling(notes.append)("learn layers", 1, 2)
    assert asked == []
    monkeypatch.setattr(inside_module, "EVERY", 0.0)
    tell = Telling(notes.append)
    for done in range(3):
        tell("learn layers", done, 2)
    assert asked == [0, 50, 100]
    assert notes == ["Prefect does not show this run's numbers (no room); the run goes on"]


class Told(Reporter):
    """Notes what it is told of groups that others are at."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.told: list[tuple[Sequence[str], float]] = []

    def beside(self, labels: Sequence[str], units: float) -> None:
        """Notes it."""
        self.told.append((labels, units))
        super().beside(labels, units)


class Nobody:
    """Takes whatever is sent."""

    at_once, count, cluster = 8, 4, None

    def submit(self, *_: object) -> UUID:
        return uuid4()


def test_people_are_told_of_the_stage_that_they_wait_for(
    inputs: pico.Inputs, warm_home: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is done but for its turn counts whole; another stage, and the group before, do not."""
    settings = inputs.settings(warm_home)
    pipeline, store, _ = pico.build(settings)
    session, reporter = Session(store), Told()
    config = RunConfig(**settings)
    workers: Any = Nobody()
    groups = pipeline.groups
    hands = Elsewhere(pipeline, groups, session, workers, config, Notes(), reporter)
    decompose = [group for group in groups if group.stage == "decompose"]
    collect = [group for group in groups if group.stage == "collect"]
    for group in groups[: groups.index(collect[1])]:
        session.run(group)
    strand = [group for group in groups if group.strand == collect[0].strand]
    hands._strand = dict.fromkeys(strand, tuple(strand)) | {g: (g,) for g in decompose}
    monkeypatch.setattr("flows.runs.hands.read_by", lambda groups, before=(): [])
    hands._send(strand[1:])
    hands._send([decompose[0]])
    hands._done[decompose[1]] = []
    at, of_layers = (hands._runs[groups.index(group)] for group in (strand[1], decompose[0]))
    said = {at: Inside(f"collect {strand[1].label}  1/2", 0.5)}
    said[of_layers] = Inside(f"decompose {decompose[0].label}  3/4", 0.75)
    monkeypatch.setattr(hands._reading, "of", lambda runs: said)
    hands._show("decompose")
    whole, part = len(decompose[1].units), 0.75 * len(decompose[0].units)
    assert reporter.told[-1] == ([said[of_layers].label], whole + part)
    assert reporter.standing().count(f"{decompose[0].label}  3/4") == 0  # no stage is open
    hands._show("collect")
    assert reporter.told[-1] == ([said[at].label], 0.5 * len(strand[1].units))
    said[at] = Inside(f"collect {collect[0].label}  2/2", 1.0)
    hands._show("collect")
    assert reporter.told[-1] == ([], 0.0)


def test_the_line_says_what_others_are_at() -> None:
    reporter = Reporter(quiet=True)
    reporter._begin("decompose", 30)
    reporter.beside(["decompose block 3  1/2", "decompose block 4  5/7"], 6.0)
    assert reporter.standing().startswith("0 of 30, block 3  1/2 and 1 more; ")
    assert "time left not known yet" not in reporter.standing()
    reporter.beside([], 0.0)
    assert reporter.standing().startswith("0 of 30; ")
