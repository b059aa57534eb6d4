"""Recovery as a stage: of any method, cached, resumable, evaluated before and after, tracked."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress_core.errors import ConfigError
from flows.commands.plan import plan_as_run_or_sweep
from flows.runs import target as target_search
from flows.runs.forecast import Planner
from flows.settings.checks import check_methods
from flows.settings.config import RunConfig
from tasks.engine.dense_model import FOLDER
from tasks.tracking.speaking import speaking
from tests.pipeline import pico
from tests.pipeline.conftest import Run
from tests.pipeline.halting import halt

TRAINED = {"recover", "materialise", "evaluate"}
SHORT: dict[str, Any] = {"recover": "factors", "recover_steps": 8}


@pytest.fixture(scope="module")
def recovered(inputs: pico.Inputs, tmp_path_factory: pytest.TempPathFactory) -> pico.Walk:
    return pico.walk(inputs.settings(tmp_path_factory.mktemp("recovered") / "home", **SHORT))


def attributes(walk: pico.Walk, stage: str) -> list[dict[str, Any]]:
    """Of a stage's artifacts, in order."""
    manifests = walk.session.manifests
    return [dict(walk.session.artifact(u).attrs) for u in manifests if u.stage == stage]


def folders(walk: pico.Walk) -> list[Path]:
    """The model's folder before and after."""
    units = [unit for unit in walk.session.manifests if unit.stage == "materialise"]
    return [Path(walk.session.artifact(unit).file(FOLDER)) for unit in units]


def test_numbers_change_and_their_count_does_not(recovered: pico.Walk) -> None:
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
    assert changed
    assert all(".mlp." in key or ".self_attn." in key for key in changed)
    assert (one / "model.safetensors").stat().st_size == (
        other / "model.safetensors"
    ).stat().st_size


def test_what_files_hold_in_another_dtype_than_the_model_runs_in_keeps_it(
    inputs: pico.Inputs, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(inputs.model, folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "float32"
    for stored, runs in ((torch.float32, "bfloat16"), (torch.bfloat16, "float32")):
        (folder / "config.json").write_text(json.dumps(config | {"dtype": runs}))
        weights = load_file(inputs.model / "model.safetensors")
        cast = {name: tensor.to(stored) for name, tensor in weights.items()}
        save_file(cast, folder / "model.safetensors", metadata={"format": "pt"})
        walk = pico.walk(inputs.settings(tmp_path / runs, model=str(folder), **SHORT))
        for made in folders(walk):
            tensors = load_file(made / "model.safetensors")
            bits = {name for name in tensors if name.endswith(".pivot_rows")}
            assert {tensors[name].dtype for name in tensors.keys() - bits} == {stored}


def test_it_is_measured_before_and_after(recovered: pico.Walk) -> None:
    which = [evaluation.model for evaluation in recovered.pipeline.evaluations]
    assert which == ["dense", "unrecovered", "compressed"]
    dense, before, after = attributes(recovered, "evaluate")
    assert dense["kl"] == 0 < after["kl"] < before["kl"]
    (report,) = (found["report"] for found in attributes(recovered, "recover"))
    assert report["best"] < report["start"]


@pytest.mark.parametrize(
    ("changes", "computed"),
    [
        ({}, set()),
        ({"recover": None, "recover_steps": 400}, set()),
        ({"recover_steps": 6}, TRAINED),
        ({"recover_seed": 9}, TRAINED),
        ({"recover": "lora"}, TRAINED),
        ({"kept": 0.5}, TRAINED | {"allocate", "realise"}),
        ({"refresh": ["recover"]}, {"recover"}),
    ],
)
def test_only_what_changed_is_trained(
    changes: dict[str, Any],
    computed: set[str],
    recovered: pico.Walk,
    inputs: pico.Inputs,
    home: Path,
) -> None:
    shutil.copytree(recovered.session.store.root, home / "store")
    found = pico.walk(inputs.settings(home, **{**SHORT, **changes}))
    assert set(found.computed) == computed
    if "recover_steps" in changes and computed:
        assert found.computed["materialise"] == {"recovered model"}
        assert found.computed["evaluate"] == {"compressed on evaluation.txt"}
    assert pico.scratch_left(home / "store") == []


@pytest.mark.parametrize(
    ("method", "how"),
    [("svd", "factors"), ("oats", "factors"), ("duo_svd", "lora"), ("wanda", "lora")],
)
def test_every_kind_of_layer_is_trained(
    method: str, how: str, inputs: pico.Inputs, home: Path
) -> None:
    walk = pico.walk(inputs.settings(home, method=method, recover=how, recover_steps=4))
    before, after = attributes(walk, "materialise")
    assert before == after
    assert "calibration" in walk.names("tokenise")


MOMENTS = [  # as a walk comes by
    ("scratch", "training at step 4", "before"),
    ("scratch", "training at step 18", "after"),
    ("recover", "factors", "before"),
    ("recover", "factors", "after"),
]


def test_killed_at_one_moment_after_another_it_goes_on_with_the_same_numbers(
    recovered: pico.Walk, inputs: pico.Inputs, home: Path
) -> None:
    """Each walk but the last is killed; in a home where all is done but the training."""
    settings = inputs.settings(home, **SHORT)
    shutil.copytree(recovered.session.store.root, home / "store")
    for stage in TRAINED:
        shutil.rmtree(home / "store" / stage)
    for stage, unit, when in MOMENTS:
        made = halt(settings, stage, unit, when)
        assert (("recover", "factors") in made) == ((unit, when) == ("factors", "after"))
    found = pico.walk(settings)
    assert found.digests == recovered.digests
    assert pico.scratch_left(home / "store") == []
    assert "recover" not in found.computed


def test_a_run_shows_and_tracks_it(
    run: Run, recovered: pico.Walk, inputs: pico.Inputs, home: Path
) -> None:
    shutil.copytree(recovered.session.store.root, home / "store")
    result = run(inputs.settings(home, **SHORT))
    assert result["method"] == "svd_llm+factors"
    assert "pico-svd_llm+factors-0.6" in result["model_dir"]
    metrics = result["metrics"]
    assert list(metrics) == ["dense", "unrecovered", "compressed"]
    assert metrics["compressed"]["kl"] < metrics["unrecovered"]["kl"]
    with speaking(home, "to look") as client:
        data = client.get_run(result["run_id"]).data
        history = client.get_metric_history(result["run_id"], "recover/held_back")
    assert data.metrics["unrecovered/perplexity"] == metrics["unrecovered"]["perplexity"]
    assert {"recover/kl", "recover/text", "recover/step_size", "recover/tried"} <= set(data.metrics)
    steps = [point.step for point in history]
    assert len(steps) == SHORT["recover_steps"] == len(set(steps))
    assert data.metrics["recover/held_back"] == history[-1].value


def test_a_perplexity_is_met_by_the_recovered_model(
    run: Run,
    recovered: pico.Walk,
    inputs: pico.Inputs,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(target_search, "TOLERANCE", 0.1)  # four steps; test_target takes them all
    shutil.copytree(recovered.session.store.root, home / "store")
    target = attributes(recovered, "evaluate")[0]["perplexity"] * 1.5
    settings = inputs.settings(home, **SHORT, kept=None, target_perplexity=target)
    result = run(settings)
    assert result["metrics"]["compressed"]["perplexity"] <= target
    assert result["kept"] < 0.9


def test_a_plan_shows_it(
    recovered: pico.Walk, inputs: pico.Inputs, capsys: pytest.CaptureFixture[str]
) -> None:
    home = recovered.session.store.root.parent
    pipeline, store, _ = pico.build(inputs.settings(home, **{**SHORT, "recover_steps": 40}))
    planned = {(unit.stage, unit.unit): unit for unit in Planner(store).plan(pipeline)}
    training = planned["recover", "factors"]
    assert (training.state, training.why) == ("run", "steps 8 → 40")
    assert sum(training.cost.products.values()) > 40 * 4 * 48 * 6
    assert planned["teacher", "top tokens"].state == "cached"
    given = inputs.settings(home, **SHORT)
    plan_as_run_or_sweep(given, None, False, print)
    assert "recover      cached" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "svd", "calibration": None}, "--recover factors trains on calibration text"),
        ({"samples": 3}, "recovery holds 2 of 3 calibration windows back"),
        ({"recover": None}, "--recover-steps without --recover"),
    ],
)
def test_what_cannot_be_is_refused_before_work_starts(
    changes: dict[str, Any], said: str, inputs: pico.Inputs, home: Path
) -> None:
    config = RunConfig(**inputs.settings(home, **{**SHORT, **changes}))
    with pytest.raises(ConfigError, match=said):
        check_methods(config, [config.method], [0.6])
