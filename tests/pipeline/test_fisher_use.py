"""``--allocate fisher``: gradients are collected once, whatever the method, budget and damping."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from compress_core.allocate.fisher import Fisher
from compress_core.curvature import OutputFisher, divergence_by_rank
from compress_core.stats import InputStats
from flows.runs.forecast import Planner
from flows.runs.foretold import foretold, predicted_kl
from tasks.engine.units import Unit
from tasks.engine.work import Interrupted, Work
from tasks.stages import collect_outputs
from tasks.stages.arrays import Stored, dense_weight_of, get_tensor
from tasks.stages.collect_outputs import passes
from tasks.stages.predict import PREDICTED
from tests.made_up import layers_of
from tests.pipeline import pico

BLOCKS = 2


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> pico.Inputs:
    return pico.make_inputs(
        tmp_path_factory.mktemp("fisher"), config=partial(pico.llama, blocks=BLOCKS)
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def first(inputs: pico.Inputs, home: Path) -> pico.Walk:
    return pico.walk(inputs.settings(home, method="svd_llm@fisher:windows=4", kept=0.6))


def gradients_of(walk: pico.Walk) -> set[str]:
    """Units of gradients at outputs that were computed."""
    made = walk.computed.get("collect", set())
    return {name for name in made if name.startswith(collect_outputs.OF)}


@pytest.mark.parametrize(
    ("changes", "again"),
    [
        ({"kept": 0.5}, set()),
        ({"rank_multiple": 2}, set()),
        ({"method": "saes_svd@fisher:windows=4"}, set()),
        ({"method": "duo_svd@fisher:windows=4"}, set()),
        ({"method": "svd_llm@fisher:windows=4:damp=0.5"}, {"predict"}),
        ({"method": "svd@fisher:windows=4"}, {"decompose", "predict"}),
        ({"method": "basis_sharing@fisher:windows=4"}, {"decompose", "predict"}),
    ],
)
def test_what_is_asked_next_reads_the_same_gradients(
    changes: dict[str, Any], again: set[str], first: pico.Walk, inputs: pico.Inputs, home: Path
) -> None:
    assert len(gradients_of(first)) == 7 * BLOCKS
    walk = pico.walk(inputs.settings(home, **{"method": "svd_llm@fisher:windows=4"} | changes))
    assert not gradients_of(walk)
    assert {"collect", "decompose", "predict"} & set(walk.computed) == again
    dense = sum(layer.dense_cost for layer in walk.pipeline.job.model.layout.layers)
    kept = walk.pipeline.job.kept
    assert walk.session.artifact(walk.pipeline.folder).attrs["compressible"] <= kept * dense


@pytest.mark.parametrize("method", ["fwsvd@fisher:windows=4", "asvd@fisher:windows=4"])
def test_a_method_that_reads_no_gram_itself_gets_one(
    method: str, first: pico.Walk, inputs: pico.Inputs, home: Path
) -> None:
    walk = pico.walk(inputs.settings(home, method=method))
    assert not gradients_of(walk)
    assert len(walk.computed["predict"]) == 7 * BLOCKS


@pytest.mark.parametrize("method", ["svd_llm", "svd", "basis_sharing"])
def test_the_curve_is_that_of_the_factors_in_the_store(
    method: str, first: pico.Walk, inputs: pico.Inputs, home: Path
) -> None:
    """Layer by layer, for layers that share a basis summed over them."""
    walk = pico.walk(inputs.settings(home, method=f"{method}@fisher:windows=4"))
    job, session = walk.pipeline.job, walk.session
    units = {(unit.stage, unit.name): unit for unit in session.manifests}
    name, stack = next(iter(job.stacks.items()))
    record = Stored(session.artifact(units["decompose", name]))
    u, v, start = record.tensor("ut").T, record.tensor("v"), 0
    expected = torch.zeros(len(record.tensor("loss")), dtype=torch.float64)
    for layer in stack.members:
        stop = start + layer.out_features
        gradients = session.artifact(units["collect", f"{collect_outputs.OF} {layer.name}"])
        weight = dense_weight_of(job, layer)
        tap = Stored(session.artifact(units["collect", layer.tap]))
        moment = InputStats.unpack(tap).moment
        fisher = OutputFisher.unpack(Stored(gradients)).damped(Fisher().damp)
        expected += divergence_by_rank(weight, u[start:stop], v, moment, fisher)
        start = stop
    found = get_tensor(session.artifact(units["predict", name]), PREDICTED)
    torch.testing.assert_close(found, expected)
    assert (found[:-1] >= found[1:] - 1e-9).all() or method != "svd_llm"


def test_passes_over_runs_of_blocks_give_the_same(
    first: pico.Walk, inputs: pico.Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect_outputs, "free_memory", lambda device: 1)
    settings = inputs.settings(tmp_path, method="svd_llm@fisher:windows=4", kept=0.6)
    walk = pico.walk(settings)
    groups = [g for g in walk.pipeline.groups if "output gradients" in g.label]
    assert [group.label for group in groups] == [
        f"output gradients of block {block}" for block in range(BLOCKS)
    ]
    assert walk.digests == first.digests


def test_a_run_that_was_stopped_goes_on_at_its_pass(
    inputs: pico.Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect_outputs, "free_memory", lambda device: 1)
    settings = inputs.settings(tmp_path, method="svd_llm@fisher:windows=2", kept=0.6)
    stopped = 0

    def progress(work: Work, done: int, total: int, detail: str = "") -> None:
        nonlocal stopped
        if work.group.label == "output gradients of block 1":
            stopped += 1
            raise Interrupted

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Work, "progress", progress)
        pico.walk(settings)
    walk = pico.walk(settings)
    assert stopped == 1
    assert {name.split(".layers.")[1][0] for name in gradients_of(walk)} == {"1"}


def test_all_windows_are_asked_for_with_none(inputs: pico.Inputs, tmp_path: Path) -> None:
    groups = {}
    for windows in (0, 12, 100):
        settings = inputs.settings(tmp_path, method=f"svd@fisher:windows={windows}")
        pipeline, _, _ = pico.build(settings)
        groups[windows] = [
            u.settings for g in pipeline.groups for u in g.units if collect_outputs.OF in u.settings
        ]
    assert groups[0] == groups[12] == groups[100]
    assert {settings["windows"] for settings in groups[0]} == {12}


def test_the_texts_own_labels_need_no_seed(inputs: pico.Inputs, tmp_path: Path) -> None:
    for labels in ("sampled", "text"):
        pipeline, _, _ = pico.build(inputs.settings(tmp_path, method=f"svd@fisher:labels={labels}"))
        units = [u for g in pipeline.groups for u in g.units if collect_outputs.OF in u.settings]
        assert {unit.settings["labels"] for unit in units} == {labels}
        assert all(("seed" in unit.settings) == (labels == "sampled") for unit in units)


def test_passes_are_runs_of_whole_blocks_within_the_limit() -> None:
    layers = layers_of([(10, 4)] * 8)  # two to a block: 1600 bytes of sums each block
    assert [len(p) for p in passes(layers, 1)] == [2, 2, 2, 2]
    assert [len(p) for p in passes(layers, 3200)] == [4, 4]
    assert [len(p) for p in passes(layers, 5000)] == [6, 2]
    assert [x for p in passes(layers, 3200) for x in p] == layers


def test_a_plan_foretells_other_budgets_once_the_curves_are_there(
    first: pico.Walk, inputs: pico.Inputs, home: Path, tmp_path: Path
) -> None:
    """By the run's own allocator; nothing of that is said where a curve is missing."""
    settings = inputs.settings(home, method="svd_llm@fisher:windows=4", kept=0.5)
    pipeline, store, _ = pico.build(settings)
    planner = Planner(store)
    planner.plan(pipeline)
    curve = foretold(planner, pipeline)
    assert len(curve) > 5 and curve == sorted(curve, key=lambda point: point.kept)
    losses = [point.divergence for point in curve]
    assert losses == sorted(losses, reverse=True) and losses[-1] > 0
    sizes = [point.bytes for point in curve]
    assert sizes == sorted(sizes) and sizes[-1] < pipeline.job.model.nbytes
    # The budget that was run, by hand: the shares that it was given.
    (share,) = {point.divergence for point in curve if abs(point.kept - 0.6) < 0.02}
    units = [u for g in first.pipeline.groups for u in g.units if u.stage == "predict"]
    allocation = first.pipeline.allocation
    assert isinstance(allocation, Unit)
    ranks = first.session.artifact(allocation).attrs["ranks"]
    by_hand = 0.0
    for unit in units:
        divergence = get_tensor(first.session.artifact(unit), PREDICTED)
        by_hand += 0.0 if ranks[unit.name] is None else float(divergence[ranks[unit.name]])
    assert share == pytest.approx(by_hand)
    assert predicted_kl(first.pipeline, first.session.artifact) == pytest.approx(by_hand)
    elsewhere, empty, _ = pico.build(inputs.settings(tmp_path, method="svd_llm@fisher", kept=0.5))
    planner = Planner(empty)
    planner.plan(elsewhere)
    assert foretold(planner, elsewhere) == []
