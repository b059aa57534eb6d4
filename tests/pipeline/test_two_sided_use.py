"""`--metric two_sided`: what is collected for it, what is in its keys, what comes out, its cost."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from compress_core.curvature import OutputFisher
from compress_core.stats import InputStats
from tasks.engine.cost import EXACT
from tasks.engine.units import Unit
from tasks.stages import collect_outputs
from tasks.stages.arrays import Stored, dense_weight_of, get_tensor
from tasks.stages.predict import PREDICTED
from tasks.stages.two_sided import GRADIENTS
from tests import literal
from tests.pipeline import pico

BLOCKS = 2
LAYERS = 7 * BLOCKS


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> pico.Inputs:
    return pico.make_inputs(
        tmp_path_factory.mktemp("two_sided"), config=partial(pico.llama, blocks=BLOCKS)
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def plain(inputs: pico.Inputs, home: Path) -> pico.Walk:
    return pico.walk(inputs.settings(home, method="svd_llm"))


@pytest.fixture(scope="module")
def first(plain: pico.Walk, inputs: pico.Inputs, home: Path) -> pico.Walk:
    return pico.walk(inputs.settings(home, method="svd_llm", metric="two_sided"))


def units_of(settings: dict[str, Any]) -> dict[tuple[str, str], Unit]:
    """What a run would make."""
    pipeline, _, _ = pico.build(settings)
    return {(unit.stage, unit.name): unit for group in pipeline.groups for unit in group.units}


def gradients_of(units: dict[tuple[str, str], Unit]) -> list[dict[str, Any]]:
    """Settings of the gradients at outputs, but for whose they are."""
    found = [unit.settings for unit in units.values() if collect_outputs.OF in unit.settings]
    return [{k: v for k, v in x.items() if k != collect_outputs.OF} for x in found]


def test_beside_what_is_there_it_collects_gradients_and_decomposes_again(first: pico.Walk) -> None:
    made = {stage: len(names) for stage, names in first.computed.items()}
    assert made.pop("allocate", 0) <= 1  # reads shapes alone, so the other method has made it
    assert made == {
        "collect": LAYERS,
        "decompose": LAYERS,
        "realise": LAYERS,
        "materialise": 1,
        "evaluate": 1,
    }
    assert all(name.startswith(collect_outputs.OF) for name in first.computed["collect"])


def test_the_option_is_the_flag(first: pico.Walk, inputs: pico.Inputs, home: Path) -> None:
    walk = pico.walk(inputs.settings(home, method="svd_llm:metric=two_sided"))
    assert walk.computed == {} and walk.keys == first.keys


@pytest.mark.parametrize(
    ("changes", "again"),
    [
        ({"kept": 0.5}, {}),
        ({"method": "svd_llm_v2"}, {}),
        ({"method": "svd_llm@hull"}, {"probe": LAYERS}),
        ({"method": "svd_llm@fisher"}, {"predict": LAYERS}),
        ({"method": "svd_llm@fisher:damp=0.5"}, {"predict": LAYERS}),
        ({"method": "duo_svd@uniform"}, {}),
        ({"method": "saes_svd:prefix=block"}, {"measure": 4 * BLOCKS, "advance": BLOCKS}),
        ({"method": "svd_llm", "factors": "plain"}, {"decompose": LAYERS}),
        ({"method": "svd_llm:metric_damp=0.5"}, {"decompose": LAYERS}),
        ({"method": "svd"}, {"decompose": LAYERS}),
        ({"method": "svd_llm@fisher", "metric": "inputs"}, {"predict": LAYERS}),
        ({"method": "svd_llm", "metric": "inputs"}, {}),
    ],
)
def test_what_is_asked_next_reads_the_same_gradients(
    changes: dict[str, Any],
    again: dict[str, int],
    first: pico.Walk,
    inputs: pico.Inputs,
    home: Path,
) -> None:
    settings = {"method": "svd_llm", "metric": "two_sided"} | changes
    made = pico.walk(inputs.settings(home, **settings)).computed
    last = {"allocate", "realise", "materialise", "evaluate"}
    found = {stage: len(names) for stage, names in made.items() if stage not in last}
    assert found == again


def test_without_it_no_key_knows_of_it(inputs: pico.Inputs, home: Path) -> None:
    for method in ("svd_llm", "duo_svd@uniform", "saes_svd", "svd_llm@fisher"):
        for (stage, _), unit in units_of(inputs.settings(home, method=method)).items():
            assert "two sided" not in unit.settings and GRADIENTS not in unit.upstream, stage


def test_only_a_fit_reads_gradients_again(inputs: pico.Inputs, home: Path) -> None:
    damping = {"kind": "TwoSided", "damp": 0.1}
    for method, fits in (("svd_llm", False), ("duo_svd@uniform", True), ("ada_svd", True)):
        units = units_of(inputs.settings(home, method=method, metric="two_sided"))
        for (stage, name), unit in units.items():
            reads = stage == "decompose" or (stage == "realise" and fits)
            assert (GRADIENTS in unit.inputs) == ("two sided" in unit.settings) == reads
            if reads:
                assert unit.inputs[GRADIENTS].settings[collect_outputs.OF] == name
                assert unit.settings["two sided"] == damping


def test_windows_and_labels_are_the_allocators_where_it_asks_for_some(
    inputs: pico.Inputs, home: Path
) -> None:
    def found(method: str) -> list[dict[str, Any]]:
        return gradients_of(units_of(inputs.settings(home, method=method, metric="two_sided")))

    alone = found("svd_llm")
    assert len(alone) == LAYERS
    assert {(x["windows"], x["labels"], x["seed"]) for x in alone} == {(12, "sampled", 3)}
    assert alone == found("svd_llm@fisher") == found("svd@hull")
    asked = found("svd_llm@fisher:windows=4:labels=text")
    assert len(asked) == LAYERS
    assert {(x["windows"], x["labels"]) for x in asked} == {(4, "text")}


def test_what_is_stored_is_the_literal_formula_of_what_was_measured(first: pico.Walk) -> None:
    units = {(unit.stage, unit.name): unit for unit in first.session.manifests}
    session, job = first.session, first.pipeline.job
    for layer in job.model.layout.of_block(1):
        gradients = Stored(session.artifact(units["collect", f"{collect_outputs.OF} {layer.name}"]))
        g = OutputFisher.unpack(gradients).damped(0.1)
        tap = InputStats.unpack(Stored(session.artifact(units["collect", layer.tap])))
        record = Stored(session.artifact(units["decompose", layer.name]))
        weight = dense_weight_of(job, layer).double()
        ut, v = record.tensor("ut", 5), record.tensor("v", 5)
        expected = literal.two_sided(weight, tap.moment, g, 5)
        atol = 1e-4 * float(weight.abs().max())
        torch.testing.assert_close((ut.T @ v).double(), expected, rtol=0, atol=atol)
        loss = record.tensor("loss")
        rest = weight - expected
        assert float(loss[5]) == pytest.approx(float((g @ rest @ tap.moment * rest).sum()))


def test_the_prediction_at_the_same_damping_is_half_of_the_loss(
    first: pico.Walk, inputs: pico.Inputs, home: Path
) -> None:
    settings = inputs.settings(home, method="svd_llm@fisher:damp=0.1", metric="two_sided")
    walk = pico.walk(settings)
    units = {(unit.stage, unit.name): unit for unit in walk.session.manifests}
    for layer in walk.pipeline.job.layers:
        loss = get_tensor(walk.session.artifact(units["decompose", layer.name]), "loss")
        curve = get_tensor(walk.session.artifact(units["predict", layer.name]), PREDICTED)
        torch.testing.assert_close(curve, loss / 2, rtol=1e-3, atol=1e-5 * float(loss[0]))


def test_it_costs_two_factorisations_and_products(inputs: pico.Inputs, home: Path) -> None:
    one, both = (
        units_of(inputs.settings(home, method="duo_svd@uniform:factors=plain", metric=metric))
        for metric in ("inputs", "two_sided")
    )
    name = "model.layers.0.mlp.up_proj"  # (56, 32), 20 components pay
    ranks = {"decompose": 20, "realise": 2 * 32}
    for stage, rank in ranks.items():
        before, after = one[stage, name].cost, both[stage, name].cost
        assert after.eigen == before.eigen
        more = after.products[EXACT] - before.products[EXACT]
        assert more == pytest.approx(56**2 * (2 * 56 / 3 + 2 * 32 + rank))
        assert after.memory - before.memory == 8 * (5 * 56**2 + 56 * 32)
        assert after.disk == before.disk
    assert one["allocate", "model"].cost == both["allocate", "model"].cost
    alone = units_of(inputs.settings(home, method="svd_llm", metric="two_sided"))
    assert alone["realise", name].cost.eigen == 0
