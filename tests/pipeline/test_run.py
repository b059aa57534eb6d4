"""The whole command: result, accounting, folder, tracking, output, and two processes at once."""

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compress_core.errors import NumericsError
from flows.settings.config import RunConfig, SweepConfig
from tasks.engine.prefect_task import run_group
from tasks.engine.session import Session
from tasks.tracking.speaking import TrackingError
from tests.pipeline import pico
from tests.pipeline.conftest import Run
from tests.pipeline.stored import numbers_in

COLD = pico.UNITS | {"register": 1}


def test_the_result_says_everything(cold: dict[str, Any], inputs: pico.Inputs) -> None:
    assert pico.counts(cold["stages"], "computed") == COLD
    assert {"model_dir", "method", "kept", "registered", "seconds", "notes", "seed"} <= set(cold)
    assert (cold["method"], cold["kept"], cold["seed"]) == ("svd_llm", 0.6, 3)
    for which in ("dense", "compressed"):
        metrics = cold["metrics"][which]
        assert metrics["perplexity"] == metrics["texts"]["evaluation.txt"]["perplexity"]
        assert metrics["texts"]["evaluation.txt"]["windows"] == 5
        assert metrics["texts"]["evaluation.txt"]["length"] == 48
    assert cold["metrics"]["dense"]["kl"] == 0 < cold["metrics"]["compressed"]["kl"]
    assert cold["registered"] == {"name": "pico", "version": 1}
    assert json.loads(json.dumps(cold)) == cold


def test_again_everything_but_the_registration_is_cached(
    run: Run, cold: dict[str, Any], cold_home: Path, inputs: pico.Inputs
) -> None:
    store, folder = pico.tree(cold_home / "store"), pico.tree(Path(cold["model_dir"]))
    warm = run(inputs.settings(cold_home))
    assert pico.counts(warm["stages"], "computed") == {"register": 1}
    assert pico.counts(warm["stages"], "cached") == pico.UNITS
    assert warm["registered"]["name"] == "pico"
    assert warm["registered"]["version"] > cold["registered"]["version"]
    assert pico.tree(cold_home / "store") == store
    assert pico.tree(Path(warm["model_dir"])) == folder
    same = ("model_dir", "parameters", "bytes", "metrics", "code_version")
    assert {name: warm[name] for name in same} == {name: cold[name] for name in same}
    assert os.listdir(cold_home / "models") == [Path(cold["model_dir"]).name]


def test_accounting_is_exact(cold: dict[str, Any], cold_home: Path, inputs: pico.Inputs) -> None:
    parameters = cold["parameters"]
    assert (parameters["dense"], cold["bytes"]["dense"]) == numbers_in(inputs.model)
    assert (parameters["compressed"], cold["bytes"]["compressed"]) == numbers_in(cold["model_dir"])
    assert parameters["compressible_compressed"] <= 0.6 * parameters["compressible_dense"]
    removed = parameters["compressible_dense"] - parameters["compressible_compressed"]
    assert parameters["dense"] - parameters["compressed"] == removed
    artifacts = cold_home / "mlartifacts" / cold["run_id"] / "artifacts"
    rows = list(csv.DictReader(io.StringIO((artifacts / "allocation.csv").read_text())))
    assert len(rows) == pico.UNITS["decompose"]
    assert sum(int(r["parameters"]) for r in rows) == parameters["compressible_compressed"]
    assert sum(int(r["dense_parameters"]) for r in rows) == parameters["compressible_dense"]
    config = json.loads((Path(cold["model_dir"]) / "config.json").read_text())
    modules = config["quantization_config"]["modules"]
    assert {r["layer"]: int(r["rank"]) for r in rows} == {n: m["rank"] for n, m in modules.items()}
    assert all((artifacts / name).stat().st_size for name in ("allocation.png", "eigenpress.yaml"))
    tracked = json.loads((artifacts / "result.json").read_text())
    assert tracked["parameters"] == parameters


def test_kept_one_is_the_dense_model_to_the_bit(
    run: Run, cold_home: Path, inputs: pico.Inputs
) -> None:
    whole = run(inputs.settings(cold_home, kept=1.0))
    dense, small = whole["metrics"]["dense"], whole["metrics"]["compressed"]
    assert (small["kl"], small["perplexity"]) == (0.0, dense["perplexity"])
    saved = load_file(Path(whole["model_dir"]) / "model.safetensors")
    original = load_file(inputs.model / "model.safetensors")
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name]) for name in saved)
    assert whole["parameters"]["dense"] == whole["parameters"]["compressed"]


def test_the_version_carries_what_it_was_made_from(cold: dict[str, Any], cold_home: Path) -> None:
    from tasks.tracking import client as tracking

    with pico.environment(pico.clean_environment()):
        tags = tracking.read_tags(cold_home, "pico", 1)
        keys = tracking.registered_keys(cold_home)
    for which in ("dense", "compressed"):
        found = float(tags[f"{which}.perplexity"])
        assert found == pytest.approx(cold["metrics"][which]["perplexity"], rel=1e-5)
    assert (tags["seed"], tags["kept"], tags["method"]) == ("3", "0.6", "svd_llm")
    assert tags["code_version"] == cold["code_version"]
    made = {stage["key"] for stage in cold["stages"] if stage["name"] != "register"}
    assert {key[:20] for key in made} <= keys


def test_the_registered_folder_loads(
    cold: dict[str, Any], cold_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.artifacts import download_artifacts

    from compress_core.hf.loading import load_model
    from tasks.tracking import client as tracking

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking.tracking_uri(cold_home))
    folder = Path(download_artifacts("models:/pico/1"))
    assert folder.resolve() == Path(cold["model_dir"])
    assert load_model(folder)(torch.zeros(1, 4, dtype=torch.long)).logits.shape[:2] == (1, 4)


@pytest.mark.parametrize(
    ("method", "layer", "stage"),
    [
        ("svd", "model.layers.1.self_attn.q_proj", "decompose"),
        ("svd_llm", f"model.layers.{pico.BLOCKS - 1}.mlp.down_proj", "collect"),
        ("svd_llm", "model.layers.1.mlp.up_proj", "collect"),
    ],
)
def test_a_weight_that_is_not_a_number_stops_the_run(
    method: str, layer: str, stage: str, inputs: pico.Inputs, tmp_path: Path
) -> None:
    broken = pico.copy_inputs(inputs, tmp_path / "broken")

    def spoil(weight: torch.Tensor) -> torch.Tensor:
        weight[3, 5] = torch.nan
        return weight

    pico.change_weight(broken.model, f"{layer}.weight", spoil)
    with pytest.raises(NumericsError) as caught:
        pico.walk(broken.settings(tmp_path / "home", method=method))
    named = {
        "model.layers.1.mlp.up_proj": "layer model.layers.1.mlp.down_proj: input",
        f"model.layers.{pico.BLOCKS - 1}.mlp.down_proj": f"layers.{pico.BLOCKS - 1}: output",
    }.get(layer, layer)
    assert f"stage {stage}" in str(caught.value) and named in str(caught.value)
    assert stage == "decompose" or "sample 0" in str(caught.value)
    assert not list((tmp_path / "home/store/materialise").glob("*/*"))


def test_a_sweep_is_a_list_of_runs_that_share_their_stages(
    run: Run, inputs: pico.Inputs, tmp_path: Path
) -> None:
    methods, kept = ["svd", "svd_llm"], [0.8, 0.4]
    refresh = ["tokenise", "collect"]
    results = run(inputs.settings(tmp_path / "home", methods=methods, kept=kept, refresh=refresh))
    assert [(r["method"], r["kept"]) for r in results] == [(m, k) for m in methods for k in kept]
    computed = [pico.counts(result["stages"], "computed") for result in results]
    assert [found.get("collect", 0) for found in computed] == [0, 0, pico.UNITS["collect"], 0]
    assert [found.get("tokenise", 0) for found in computed] == [1, 0, 1, 0]
    assert [found.get("decompose", 0) for found in computed] == [21, 0, 21, 0]
    assert [found["evaluate"] for found in computed] == [2, 1, 1, 1]
    assert len({result["model_dir"] for result in results}) == 4
    assert list((tmp_path / "home" / "reports").rglob("*.png"))


def test_prefect_shows_what_was_reused(
    cold_walk: pico.Walk, inputs: pico.Inputs, warm_home: Path, server_environment: dict[str, str]
) -> None:
    def states(settings: dict[str, Any]) -> dict[str, set[str]]:
        pipeline, store, _ = pico.build(settings)
        session = Session(store)
        found: dict[str, set[str]] = {}
        for group in pipeline.groups:
            state = run_group.fn(group.stage, group.label, session, group)
            found.setdefault(str(state.name), set()).add(group.stage)
        return found

    assert states(inputs.settings(warm_home)) == {"Cached": set(pico.UNITS)}
    rest = {"tokenise", "collect", "weigh", "decompose"}
    changed = {"allocate", "realise", "materialise", "evaluate"}
    found = states(inputs.settings(warm_home, kept=0.4))
    assert found == {"Cached": rest | {"evaluate"}, "Completed": changed}


def test_damage_is_told_on_the_console_when_it_is_found(
    run: Run, warm_home: Path, inputs: pico.Inputs, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = next((warm_home / "store" / "decompose").glob("*/*"))
    chunk = artifact / "arrays/v/c.0.0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    capsys.readouterr()
    result = run(inputs.settings(warm_home))
    words = " ".join(capsys.readouterr().err.split())  # the line may be broken
    assert words.count("computed again") == 1
    note = words[: words.index("computed again")].rpartition("note ")[2]
    assert artifact.name[:12] in note
    assert pico.counts(result["stages"], "computed") == {"decompose": 1, "register": 1}


def test_a_command_builds_its_method_and_each_pipeline_once(
    inputs: pico.Inputs, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.report.console import Reporter
    from flows.runs import opened, workspace
    from flows.settings import checks

    built: list[str] = []

    def counted(module: Any, name: str) -> None:
        real = getattr(module, name)

        def count(*given: Any, **named: Any) -> Any:
            built.append(name)
            return real(*given, **named)

        monkeypatch.setattr(module, name, count)

    for module in (checks, workspace):
        counted(module, "build_method")
    counted(opened, "build_pipeline")
    sweep = SweepConfig(**inputs.settings(home, methods=["svd", "svd_llm"], kept=[0.5, 0.6]))
    opened.open_command(sweep, Reporter(quiet=True))
    assert sorted(built) == ["build_method"] * 2 + ["build_pipeline"] * 4
    built.clear()
    run = RunConfig(**inputs.settings(home, kept=None, target_bytes=100_000))
    opened.open_command(run, Reporter(quiet=True))
    assert sorted(built) == ["build_method", "build_pipeline"]


def test_a_registration_that_fails_at_the_end_loses_nothing_and_says_so(
    run: Run,
    cold: dict[str, Any],
    cold_home: Path,
    inputs: pico.Inputs,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise TrackingError("MLflow at http://host refused to record the run: no")

    with monkeypatch.context() as patch:
        patch.setattr("tasks.tracking.client.record_run", refuse)
        with pytest.raises(TrackingError) as caught:
            run(inputs.settings(cold_home))
    line = str(caught.value)
    assert line.startswith("MLflow at http://host refused to record the run: no. The model is in ")
    assert line.endswith("everything computed is kept: the same command again only registers")
    again = run(inputs.settings(cold_home))
    assert pico.counts(again["stages"], "computed") == {"register": 1}
