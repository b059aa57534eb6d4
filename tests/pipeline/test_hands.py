"""Groups of a run that others compute: what is sent, in which order, and what comes of it."""

import math
import pickle
import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any
from uuid import UUID, uuid4

import pytest

from compress_core.errors import NumericsError
from flows.report.console import Reporter
from flows.runs import hands as hands_module
from flows.runs.hands import Elsewhere
from flows.runs.notes import Notes
from flows.runs.pipeline import Pipeline
from flows.runs.worker import Done, _Opened, run_order
from flows.server.workers import WorkerError
from flows.settings.config import RunConfig
from storage.errors import ArtifactMissingError
from tasks.engine.order import Order, places_of, provide, read_by
from tasks.engine.peak_memory import Peak
from tasks.engine.session import Session
from tasks.engine.work import Group
from tests.pipeline import pico

Then = Callable[[Callable[[], Done]], None]


class Fakes:
    """Stand for two processes, each with a pipeline of its own; they end in any order.

    Attributes:
        orders: What was sent.
        most: How many were out at once.
    """

    at_once, count, cluster = 3, 2, None

    def __init__(self, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.random = random.Random(seed)
        self.orders: list[Order] = []
        self.most = 0
        self.out: list[tuple[Order, Then]] = []
        self.processes = [_Opened(), _Opened()]
        self.lose: Callable[[Order], bool] = lambda order: False
        self.monkeypatch = monkeypatch

    def submit(self, task: Any, parameters: Mapping[str, Any], then: Then) -> UUID:
        assert task is run_order
        order = parameters["order"]
        assert len(pickle.dumps(order)) < 20_000  # of a configuration and numbers
        self.orders.append(order)
        self.out.append((pickle.loads(pickle.dumps(order)), then))
        self.most = max(self.most, len(self.out))
        if len(self.out) == self.at_once:
            self.work()
        return uuid4()

    def work(self) -> None:
        """One of what is out is done."""
        order, then = self.out.pop(self.random.randrange(len(self.out)))
        if self.lose(order):
            then(_lost)
            return
        opened = self.random.choice(self.processes)
        self.monkeypatch.setattr("flows.runs.worker._OPENED", opened)
        try:
            state = run_order.fn("line", "label", order)
        except Exception as error:
            failure = error

            def raises() -> Done:
                raise failure

            then(raises)
        else:
            then(lambda: state.data)  # type: ignore[arg-type, return-value]


def _lost() -> Done:
    raise WorkerError("killed")


class Run:
    """A run whose groups fakes compute."""

    def __init__(self, settings: Mapping[str, Any], fakes: Fakes) -> None:
        config = RunConfig(**settings)
        self.pipeline, store, self.problems = pico.build(settings)
        self.session = Session(store, refresh=config.refresh)
        self.notes, self.fakes = Notes(), fakes
        self.pipeline = replace(self.pipeline, config=config)
        quiet = Reporter(quiet=True)
        groups = self.pipeline.groups
        self.hands = Elsewhere(
            self.pipeline,
            groups,
            self.session,
            fakes,  # type: ignore[arg-type]
            config,
            self.notes,
            quiet,
        )

    def go(self) -> pico.Walk:
        outcomes = []
        waiting = self.hands._await

        def busy() -> None:
            if self.hands._ended.empty() and self.fakes.out:
                self.fakes.work()
            waiting()

        self.hands._await = busy  # type: ignore[method-assign]
        for group in self.pipeline.groups:
            outcomes += self.hands.outcomes(group)
        return pico.Walk(self.pipeline, self.session, outcomes, self.problems)


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cached groups are found without Prefect's server, and nobody tells it how far they are."""
    monkeypatch.setattr(hands_module.Here, "outcomes", lambda self, group: self.session.run(group))
    monkeypatch.setattr(hands_module, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr("flows.runs.inside.EVERY", math.inf)


@pytest.mark.parametrize("seed", range(3))
def test_in_whatever_order_others_end_the_artifacts_are_the_same(
    seed: int, inputs: pico.Inputs, home: Any, cold_walk: pico.Walk, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = Fakes(seed, monkeypatch)
    found = Run(inputs.settings(home), fakes).go()
    assert found.digests == cold_walk.digests
    assert found.computed == cold_walk.computed
    assert pico.payload(home / "store") == pico.payload(cold_walk.session.store.root)
    assert fakes.most == fakes.at_once
    sent = Counter(number for order in fakes.orders for number in order.numbers)
    assert set(sent.values()) == {1}
    assert len(fakes.orders) < len(found.pipeline.groups)  # a strand is one of them
    again = Fakes(seed, monkeypatch)
    assert Run(inputs.settings(home), again).go().computed == {}
    assert again.orders == []


def test_what_hands_things_on_in_memory_stays_in_one_process(
    inputs: pico.Inputs, home: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"method": "saes_svd", "recover": "blocks", "recover_steps": 2}
    alone = pico.walk(inputs.settings(tmp_path / "alone", **more))
    fakes = Fakes(0, monkeypatch)
    found = Run(inputs.settings(home, **more), fakes).go()
    assert found.digests == alone.digests
    assert pico.scratch_left(home / "store") == []
    strands = [order.numbers for order in fakes.orders if len(order.numbers) > 1]
    names = [{found.pipeline.groups[n].stage for n in numbers} for numbers in strands]
    assert names == [{"collect"}, {"measure", "realise", "advance"}, {"recover"}]


def test_groups_of_a_strand_are_taken_over_while_it_goes_on(
    inputs: pico.Inputs, warm_home: Any, cold_walk: pico.Walk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has been put into the store is enough for others to begin, before the strand ends."""
    run = Run(inputs.settings(warm_home), Fakes(0, monkeypatch))
    strand = [group for group in run.pipeline.groups if group.strand == "hidden states"]
    for group in run.pipeline.groups[: run.pipeline.groups.index(strand[0])]:
        run.session.run(group)
    while run.hands._waiting.take(run.session.manifests) != strand:
        pass  # the others are as they are sent
    run.hands._strand = dict.fromkeys(strand, tuple(strand))
    run.hands._send(strand)
    run.hands._look()
    assert list(run.hands._done) == strand[:-1]
    taken = {outcome.key: outcome for group in strand[:-1] for outcome in run.hands._done[group]}
    known = {outcome.key: outcome for outcome in cold_walk.outcomes if outcome.key in taken}
    assert {outcome.state for outcome in taken.values()} == {"cached"}  # who made them is known
    assert {key: o.cpu_seconds for key, o in taken.items()} == {
        key: o.cpu_seconds for key, o in known.items()
    }


def test_work_of_a_process_that_ends_is_sent_again_a_few_times(
    inputs: pico.Inputs, home: Any, cold_walk: pico.Walk, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes, lost = Fakes(0, monkeypatch), Counter[int]()

    def lose(order: Order) -> bool:
        lost[order.numbers[0]] += 1
        return lost[order.numbers[0]] < hands_module.TRIES

    fakes.lose = lose
    run = Run(inputs.settings(home), fakes)
    assert run.go().digests == cold_walk.digests
    assert run.notes == [hands_module.LOST]
    fakes = Fakes(0, monkeypatch)
    fakes.lose = lambda order: True
    with pytest.raises(WorkerError, match="killed"):
        Run(inputs.settings(home, kept=0.5), fakes).go()
    assert max(Counter(order.numbers for order in fakes.orders).values()) == hands_module.TRIES


def test_what_a_process_refuses_is_raised_here_with_its_traceback(
    inputs: pico.Inputs, home: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = pico.copy_inputs(inputs, tmp_path / "broken")
    name = "model.layers.1.mlp.down_proj.weight"
    pico.change_weight(broken.model, name, lambda weight: weight * float("inf"))
    with pytest.raises(NumericsError, match=r"stage collect, block 1: .* not finite") as raised:
        Run(broken.settings(home), Fakes(0, monkeypatch)).go()
    told = "\n".join(raised.value.__notes__)
    assert "in process" in told and "Traceback" in told and "collect.py" in told


def test_what_another_process_made_of_other_inputs_is_not_taken(
    inputs: pico.Inputs, warm_home: Any, cold_walk: pico.Walk
) -> None:
    pipeline, store, _ = pico.build(inputs.settings(warm_home))
    session = Session(store)
    groups = {group.stage: group for group in pipeline.groups}
    for group in pipeline.groups:
        if group.stage == "decompose":
            break
        session.run(group)
    of_others = [o for o in cold_walk.outcomes if o.stage == "decompose"][: len(group.units)]
    swapped = [of_others[1], of_others[0], *of_others[2:]]
    with pytest.raises(ArtifactMissingError, match="other inputs or with other code"):
        session.settle(groups["decompose"], swapped)
    gone = [replace(outcome, key="0" * 64) for outcome in of_others]
    with pytest.raises(ArtifactMissingError, match="all need one --home"):
        session.settle(groups["decompose"], gone)


def test_inputs_that_a_process_cannot_see_are_refused(
    inputs: pico.Inputs, home: Any, cold_walk: pico.Walk
) -> None:
    pipeline, store, _ = pico.build(inputs.settings(home))
    places = places_of(pipeline.groups)
    group = next(group for group in pipeline.groups if group.stage == "decompose")
    keys = {places[unit]: "1" * 64 for unit in read_by([group])}
    order = Order(None, pipeline.config, (), "a name", "a command", keys, 1)
    with pytest.raises(ArtifactMissingError, match="as this process sees it"):
        provide(Session(store), pipeline.groups, order)


def sequential_strand(pipeline: Pipeline) -> list[Group]:
    return [group for group in pipeline.groups if group.strand == "hidden states of both models"]


def test_a_strand_goes_on_in_a_process_that_did_not_begin_it(
    inputs: pico.Inputs, home: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a stop: hidden states are made again of what all earlier blocks came to."""
    settings = inputs.settings(home, method="saes_svd")
    alone = pico.walk(settings)
    for unit in sequential_strand(alone.pipeline)[-1].units:
        alone.session.store.remove(alone.session.manifests[unit].key)
    found = Run(settings, Fakes(0, monkeypatch)).go()
    assert found.digests == alone.digests
    assert set(found.computed) == {"advance"}


def test_a_strand_whose_process_ends_goes_on_in_another(
    inputs: pico.Inputs, home: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = pico.walk(inputs.settings(tmp_path / "alone", method="saes_svd"))
    fakes = Fakes(0, monkeypatch)
    run = Run(inputs.settings(home, method="saes_svd"), fakes)
    strand = sequential_strand(run.pipeline)
    first = run.pipeline.groups.index(strand[0])

    def lose(order: Order) -> bool:
        """It has done most of it, which the run has seen."""
        if order.numbers[0] != first:
            return False
        done = replace(order, numbers=order.numbers[: len(strand) // 2 + 1])
        monkeypatch.setattr("flows.runs.worker._OPENED", _Opened())
        run_order.fn("line", "label", done)
        run.hands._look()
        return True

    fakes.lose = lose
    assert run.go().digests == alone.digests
    sent = [order.numbers for order in fakes.orders if order.numbers[-1] == first + len(strand) - 1]
    assert [len(numbers) for numbers in sent] == [len(strand), len(strand) - len(strand) // 2 - 1]


@pytest.mark.parametrize("stages", [["collect", "decompose"], ["measure", "realise"]])
def test_every_unit_of_a_stage_is_computed_again_once_in_a_command(
    stages: list[str], inputs: pico.Inputs, home: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In groups of several units, and behind the first group of a strand, too."""
    settings = inputs.settings(home, method="saes_svd")
    before = pico.walk(settings)
    run = Run({**settings, "refresh": stages}, Fakes(0, monkeypatch))
    found = run.go()
    assert found.computed == {stage: before.names(stage) for stage in stages}
    assert found.digests == before.digests
    next_run = Run({**settings, "refresh": stages}, Fakes(0, monkeypatch))
    next_run.session.command = run.session.command
    assert next_run.go().computed == {}


def test_what_was_there_is_not_what_a_process_has_computed_again(
    inputs: pico.Inputs, warm_home: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(inputs.settings(warm_home, refresh=["collect"]), Fakes(0, monkeypatch))
    strand = [group for group in run.pipeline.groups if group.strand == "hidden states"]
    for group in run.pipeline.groups[: run.pipeline.groups.index(strand[0])]:
        run.session.run(group)
    assert run.session.absent(strand[0])
    assert run.session.standing(strand[0]) is None


def test_a_process_that_outlives_a_command_opens_the_next_one_anew(
    inputs: pico.Inputs, home: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of a cluster: the words are the same, and what is in the model's folder is not."""
    own = pico.copy_inputs(inputs, tmp_path / "own")
    asked: list[str] = []

    def claim(device: str, layout: object) -> str:
        asked.append(device)
        return device

    monkeypatch.setattr("flows.runs.worker.own_device", claim)
    first, second = Fakes(0, monkeypatch), Fakes(0, monkeypatch)
    second.processes = first.processes = first.processes[:1]
    Run(own.settings(home), first).go()
    name = "model.layers.1.mlp.down_proj.weight"
    pico.change_weight(own.model, name, lambda weight: weight * 1.5)
    found = Run(own.settings(home), second).go()
    assert "model.layers.1.mlp.down_proj" in found.computed["decompose"]
    assert found.digests == pico.walk(own.settings(tmp_path / "alone")).digests
    assert asked == ["cpu"]  # a device that is claimed twice is found taken


def test_a_stages_line_has_what_its_own_groups_took_elsewhere(
    inputs: pico.Inputs, home: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever line is open as they end: later stages are computed while earlier ones go on."""
    taken: list[int] = []

    class Counted:
        """Every group takes more than those before it, and none of it on a device."""

        def stop(self) -> Peak:
            taken.append(1_000_000 * (len(taken) + 1))
            return Peak(taken[-1], 7 * taken[-1])

    monkeypatch.setattr("flows.runs.worker.PeakMemory", Counted)
    run = Run(inputs.settings(home), Fakes(1, monkeypatch))
    made: dict[str, list[int]] = {}

    def computing(self: Session, group: Group, original: Any = Session.run) -> Any:
        if self is not run.session:
            made.setdefault(group.line, []).append(1_000_000 * (len(taken) + 1))
        return original(self, group)

    monkeypatch.setattr(Session, "run", computing)
    found: dict[str, Peak] = {}
    line, outcomes = [""], run.hands.outcomes

    def asked(group: Group) -> Any:
        line[0] = group.line
        return outcomes(group)

    def tell(peak: Peak) -> None:
        found[line[0]] = found.get(line[0], Peak()) | peak

    monkeypatch.setattr(run.hands, "outcomes", asked)
    monkeypatch.setattr(run.hands.reporter, "elsewhere", tell)
    run.go()
    assert {line: peak.ram for line, peak in found.items()} == {
        line: max(own) for line, own in made.items()
    }
    assert all(peak.accelerator == 7 * peak.ram for peak in found.values())


def test_no_key_of_what_is_cached_is_computed_twice(
    inputs: pico.Inputs, warm_home: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: Counter[str] = Counter()
    keyed = Session.recipe

    def counting(self: Session, unit: Any) -> Any:
        computed[f"{unit.stage} {unit.name}"] += 1
        return keyed(self, unit)

    monkeypatch.setattr(Session, "recipe", counting)
    run = Run(inputs.settings(warm_home), Fakes(0, monkeypatch))
    afterwards = {g.units[-1] for g in run.pipeline.groups if g.after is not None}
    assert run.go().computed == {}
    assert set(computed.values()) <= {1, 2}
    twice = {name for name, times in computed.items() if times == 2}
    assert twice == {f"{unit.stage} {unit.name}" for unit in afterwards}  # told its recipe
