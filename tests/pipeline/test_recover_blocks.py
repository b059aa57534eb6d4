"""Recovery block by block as a stage: a unit per block, a chain of keys, then the folder again."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flows.runs.findings import Findings
from flows.runs.forecast import Planner
from flows.settings.fields import BLOCKS
from tasks.tracking.speaking import speaking
from tests.pipeline import pico
from tests.pipeline.conftest import Run
from tests.pipeline.halting import halt
from tests.pipeline.test_recover import attributes, folders

SHORT: dict[str, Any] = {"recover": "blocks", "recover_steps": 4}
BLOCK = [f"model.layers.{block}" for block in range(pico.BLOCKS)]
AGAIN = {"materialise", "evaluate"}


@pytest.fixture(scope="module")
def recovered(inputs: pico.Inputs, tmp_path_factory: pytest.TempPathFactory) -> pico.Walk:
    return pico.walk(inputs.settings(tmp_path_factory.mktemp("blocks") / "home", **SHORT))


def test_numbers_and_norms_change_and_their_count_does_not(recovered: pico.Walk) -> None:
    before, after = attributes(recovered, "materialise")
    assert before == after
    one, other = folders(recovered)
    assert pico.tree(one).keys() == pico.tree(other).keys()
    assert (one / "config.json").read_bytes() == (other / "config.json").read_bytes()
    old, new = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert [(k, t.shape, t.dtype) for k, t in old.items()] == [
        (k, t.shape, t.dtype) for k, t in new.items()
    ]
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    entries = {unit for unit, found in stored(recovered).items() if found["rank"] is not None}
    inside = {
        k for k, t in old.items() if k.rpartition(".")[0] in entries and t.is_floating_point()
    }
    norms = {f"{b}.{n}_layernorm.weight" for b in BLOCK for n in ("input", "post_attention")}
    assert changed == inside | norms


def stored(walk: pico.Walk) -> dict[str, dict[str, Any]]:
    return {
        unit.name: dict(walk.session.artifact(unit).attrs)
        for unit in walk.session.manifests
        if unit.stage == "realise"
    }


def test_every_block_is_better_and_so_is_the_whole(recovered: pico.Walk) -> None:
    reports = [found["report"] for found in attributes(recovered, "recover")]
    assert len(reports) == pico.BLOCKS
    assert all(report["best"] < report["start"] for report in reports)
    dense, before, after = attributes(recovered, "evaluate")
    assert dense["kl"] == 0 < after["kl"] < before["kl"]
    assert "teacher" not in recovered.computed
    assert pico.scratch_left(recovered.session.store.root) == []


@pytest.mark.parametrize(
    ("changes", "computed"),
    [
        ({}, {}),
        ({"recover": None, "recover_steps": 400}, {}),
        ({"recover_steps": 3}, {"recover": set(BLOCK)}),
        ({"recover_seed": 9}, {"recover": set(BLOCK)}),
        ({"recover": "blocks+factors"}, {"recover": {"factors"}, "teacher": {"top tokens"}}),
        ({"refresh": ["recover"]}, {"recover": set(BLOCK)}),
    ],
)
def test_only_what_changed_is_trained(
    changes: dict[str, Any],
    computed: dict[str, set[str]],
    recovered: pico.Walk,
    inputs: pico.Inputs,
    home: Path,
) -> None:
    shutil.copytree(recovered.session.store.root, home / "store")
    found = pico.walk(inputs.settings(home, **{**SHORT, **changes}))
    trained = {stage: units for stage, units in found.computed.items() if stage not in AGAIN}
    assert trained == computed
    if "refresh" in changes or not computed:
        assert found.computed.keys() == computed.keys()
    assert pico.scratch_left(home / "store") == []


def test_evaluation_text_is_never_looked_at(
    recovered: pico.Walk, inputs: pico.Inputs, home: Path
) -> None:
    shutil.copytree(recovered.session.store.root, home / "store")
    other = home / "other.txt"
    other.write_text(pico.made_text(7, 2000), encoding="utf-8")
    found = pico.walk(inputs.settings(home, **SHORT, eval_text=[str(other)]))
    assert found.computed.keys() == {"tokenise", "evaluate"}


def test_factors_then_start_from_the_recovered_blocks(
    recovered: pico.Walk, inputs: pico.Inputs, home: Path
) -> None:
    shutil.copytree(recovered.session.store.root, home / "store")
    found = pico.walk(inputs.settings(home, **{**SHORT, "recover": "blocks+factors"}))
    plain, blocks, both = (load_file(x / "model.safetensors") for x in folders(found))
    norm = "model.layers.1.input_layernorm.weight"
    assert not torch.equal(plain[norm], blocks[norm])
    assert torch.equal(blocks[norm], both[norm])
    assert any(not torch.equal(blocks[key], both[key]) for key in both)
    which = [evaluation.model for evaluation in found.pipeline.evaluations]
    assert which == ["dense", "unrecovered", "compressed"]
    assert found.folder == folders(found)[-1]


@pytest.mark.parametrize(
    ("method", "config", "blocks"),
    [
        ("svd_llm@fisher:factors=pivot", pico.llama, 2),
        ("oats", pico.llama, 2),
        ("duo_svd", pico.gpt2, 2),
        ("basis_sharing:group=2", pico.llama, 2),
        ("ada_svd", pico.llama, 3),  # of two blocks one alone would gain
    ],
)
def test_every_kind_of_layer_is_trained(
    method: str, config: Any, blocks: int, tmp_path: Path
) -> None:
    inputs = pico.make_inputs(tmp_path / "inputs", config=partial(config, blocks=blocks))
    walk = pico.walk(inputs.settings(tmp_path / "home", method=method, **SHORT))
    before, after = attributes(walk, "materialise")
    assert before == after
    reports = [found["report"] for found in attributes(walk, "recover")]
    assert sum(report["best"] < report["start"] for report in reports) > 1


def test_a_model_that_stays_dense_stays_as_it_is(inputs: pico.Inputs, home: Path) -> None:
    walk = pico.walk(inputs.settings(home, **SHORT, method="svd", kept=1.0))
    one, other = folders(walk)
    assert pico.tree(one) == pico.tree(other)


MOMENTS = [  # as a walk comes by; and how many blocks are recovered then
    ("scratch", "training at step 4", "before", 0),
    ("scratch", "training at step 16", "after", 0),
    ("recover", BLOCK[1], "before", 1),
    ("recover", BLOCK[1], "after", 2),
    ("recover", BLOCK[-1], "after", pico.BLOCKS),
]


def test_killed_at_one_moment_after_another_it_goes_on_at_its_block_with_the_same_numbers(
    recovered: pico.Walk, inputs: pico.Inputs, warm_home: Path
) -> None:
    """Each walk but the last is killed; none trains again what one before it has trained."""
    settings = inputs.settings(warm_home, **SHORT)
    made: list[tuple[str, str]] = []
    for stage, unit, when, blocks in MOMENTS:
        made += halt(settings, stage, unit, when)
        assert [unit for stage, unit in made if stage == "recover"] == BLOCK[:blocks]
    found = pico.walk(settings)
    assert found.digests == recovered.digests
    assert "recover" not in found.computed
    assert pico.scratch_left(warm_home / "store") == []


def test_a_block_hangs_on_all_before_it(
    recovered: pico.Walk, inputs: pico.Inputs, home: Path
) -> None:
    """What it read is in its key, even where the block between came to the same."""
    units = [u for u in recovered.session.manifests if u.stage == "recover"]
    for place, unit in enumerate(units):
        assert [up for up in unit.inputs.values() if up.stage == "recover"] == units[:place]


def test_a_run_shows_and_tracks_every_block(
    run: Run, recovered: pico.Walk, inputs: pico.Inputs, home: Path
) -> None:
    shutil.copytree(recovered.session.store.root, home / "store")
    result = run(inputs.settings(home, **SHORT))
    assert result["method"] == "svd_llm+blocks"
    assert list(result["metrics"]) == ["dense", "unrecovered", "compressed"]
    reports = [found["report"] for found in attributes(recovered, "recover")]
    with speaking(home, "to look") as client:
        histories = {
            name: [
                (point.step, point.value)
                for point in client.get_metric_history(result["run_id"], f"recover/block_{name}")
            ]
            for name in ("start", "best", "held_back")
        }
    for name in ("start", "best"):
        assert histories[name] == list(enumerate(report[name] for report in reports))
    assert len(histories["held_back"]) == SHORT["recover_steps"] * pico.BLOCKS
    (shown,) = [Findings(home).of({"result": result, "config": {}})]
    assert shown.curves.keys() == {BLOCKS}
    assert shown.curves[BLOCKS]["block_best"] == [report["best"] for report in reports]


def test_a_plan_shows_every_block(recovered: pico.Walk, inputs: pico.Inputs) -> None:
    home = recovered.session.store.root.parent
    pipeline, store, _ = pico.build(inputs.settings(home, **{**SHORT, "recover_steps": 40}))
    planned = [unit for unit in Planner(store).plan(pipeline) if unit.stage == "recover"]
    assert [(unit.unit, unit.state) for unit in planned] == list(
        zip(BLOCK, ["run", "run", "run"], strict=True)
    )
    assert planned[0].why == "steps 4 → 40"
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 56
    block, outside = layer + 2 * 32, 160 * 32 + 32  # with norms; the embedding and the last norm
    trained = int(16 * 0.6 * block)  # leaf, two moments and the best state of what is kept
    for unit in planned:
        assert sum(unit.cost.products.values()) > 40 * 4 * 48 * 6 * layer
        read, given = 4 * 32 + 2 * 32 + 56, 2 * 32 + 2 * 16 + 2 * 56 + 32  # by a block's layers
        states, batch = 2 * 12 * 48 * 32 * 4, 4 * 4 * 48 * (read + given)
        assert unit.cost.memory == states + batch + trained
        assert unit.cost.held == 2 * block + outside  # the block and its gradients
