"""The whole command: result, accounting, folder, tracking, output, and two processes at once."""

import csv
import hashlib
import io
import json
import os
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compress_core.errors import ConfigError, NumericsError
from flows.config import RunConfig, build_config
from tasks.materialise import publishing
from tasks.stage import run_group
from tasks.units import Session
from tests.pipeline import pico
from tests.pipeline.conftest import Run

COLD = pico.UNITS | {"register": 1}


@pytest.fixture(scope="module")
def cold(run: Run, inputs: pico.Inputs, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The result of a whole run in an empty home."""
    return run(inputs.settings(tmp_path_factory.mktemp("cold") / "home"))


@pytest.fixture(scope="module")
def cold_home(cold: dict[str, Any]) -> Path:
    """Its home; runs may be added."""
    return Path(cold["model_dir"]).parents[1]


def numbers_in(folder: str | Path) -> tuple[int, int]:
    tensors = [t for f in Path(folder).glob("*.safetensors") for t in load_file(f).values()]
    return sum(t.numel() for t in tensors), sum(t.numel() * t.element_size() for t in tensors)


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
    assert warm["registered"] == {"name": "pico", "version": 2}
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
    from tasks import tracking

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
    from tasks import tracking

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking.tracking_uri(cold_home))
    folder = Path(download_artifacts("models:/pico/1"))
    assert folder.resolve() == Path(cold["model_dir"])
    assert load_model(folder)(torch.zeros(1, 4, dtype=torch.long)).logits.shape[:2] == (1, 4)


LOAD = """
import sys
sys.modules.update(dict.fromkeys(["compress_core", "flows", "tasks", "storage"]))
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokens = AutoTokenizer.from_pretrained(sys.argv[1])("Some text.", return_tensors="pt")
print(model(input_ids=tokens["input_ids"]).logits.double().sum().item())
"""


def test_output_and_the_configuration_in_it(
    run: Run, cold: dict[str, Any], cold_home: Path, inputs: pico.Inputs, tmp_path: Path
) -> None:
    target = tmp_path / "deep" / "out"
    first = run(inputs.settings(cold_home, output=target))
    assert first["model_dir"] == str(target)
    config = build_config(RunConfig, {}, target / "eigenpress.yaml")
    assert config.output == target
    assert config.model == str(inputs.model)
    again = run(config.model_dump())  # replaces the folder of the run before
    assert pico.counts(again["stages"], "computed") == {"register": 1}
    assert pico.tree(target).keys() == pico.tree(Path(cold["model_dir"])).keys()
    assert os.listdir(target.parent) == ["out"]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(target)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=pico.clean_environment(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hf")),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert torch.isfinite(torch.tensor(float(done.stdout)))


@pytest.mark.parametrize("case", ["model", "above the model", "documents", "file", "config", "own"])
def test_an_output_that_is_not_ours_is_refused_before_any_stage(
    case: str, inputs: pico.Inputs, tmp_path: Path
) -> None:
    mine = pico.copy_inputs(inputs, tmp_path / "mine")
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "thesis.tex").write_text("years of work")
    target = {
        "model": mine.model,
        "above the model": tmp_path / "mine",
        "documents": documents,
        "file": documents / "thesis.tex",
        "config": documents,
        "own": mine.model,
    }[case]
    settings = mine.settings(tmp_path / "home", output=target)
    if case in ("config", "own"):  # where the user keeps the settings is not what a run wrote
        text = json.dumps(RunConfig(**settings).model_dump(mode="json"))
        (target / "eigenpress.yaml").write_text(text)
        (documents / "config.json").write_text("{}")
    before = pico.tree(tmp_path)
    with pytest.raises(ConfigError, match="--output") as caught:
        pico.walk(settings)
    assert "\n" not in str(caught.value)
    after = pico.tree(tmp_path)
    assert {path: after[path] for path in before} == before
    assert not list((tmp_path / "home" / "store").glob("*/*/*/manifest.json"))


def test_an_output_folder_is_checked_again_before_it_is_replaced(
    run: Run, cold_home: Path, inputs: pico.Inputs, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    run(inputs.settings(cold_home, output=target))
    (target / "adapter").mkdir()
    (target / "adapter" / "weights.bin").write_bytes(b"trained since")
    with pytest.raises(ConfigError, match=r"adapter/weights\.bin"):
        run(inputs.settings(cold_home, output=target))
    assert (target / "adapter" / "weights.bin").read_bytes() == b"trained since"


@pytest.mark.parametrize(
    ("method", "layer", "stage"),
    [
        ("svd", "model.layers.1.self_attn.q_proj", "decompose"),
        ("svd_llm", f"model.layers.{pico.BLOCKS - 1}.mlp.down_proj", "decompose"),
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
    named = layer if stage == "decompose" else "model.layers.1.mlp.down_proj"  # its input first
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


def test_a_folder_published_by_many_at_once_is_always_whole(
    cold_walk: pico.Walk, tmp_path: Path
) -> None:
    artifact = cold_walk.session.artifact(cold_walk.pipeline.folder)
    target = tmp_path / "models" / "one"
    target.parent.mkdir()

    def publish_some(_: int) -> None:
        for _ in range(8):
            with publishing(artifact, target) as staging:
                (staging / "eigenpress.yaml").write_text("a: 1")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(publish_some, range(4)))
    assert os.listdir(target.parent) == ["one"]
    assert pico.tree(target) == pico.tree(artifact.file("model")) | {
        "eigenpress.yaml": hashlib.sha256(b"a: 1").hexdigest()
    }


def test_prefect_shows_what_was_reused(
    cold_walk: pico.Walk, inputs: pico.Inputs, warm_home: Path, server_environment: dict[str, str]
) -> None:
    def states(settings: dict[str, Any]) -> dict[str, set[str]]:
        pipeline, store, _ = pico.build(settings)
        session = Session(store)
        found: dict[str, set[str]] = {}
        for group in pipeline.groups:
            state = run_group.fn(group.stage, group.label, session, group)
            found.setdefault(state.name, set()).add(group.stage)
        return found

    assert states(inputs.settings(warm_home)) == {"Cached": set(pico.UNITS)}
    rest = {"tokenise", "collect", "whiten", "decompose"}
    changed = {"allocate", "realise", "materialise", "evaluate"}
    found = states(inputs.settings(warm_home, kept=0.4))
    assert found == {"Cached": rest | {"evaluate"}, "Completed": changed}


def test_a_killed_command_is_repeated(
    run: Run, cold_walk: pico.Walk, inputs: pico.Inputs, tmp_path: Path
) -> None:
    settings = inputs.settings(tmp_path / "home")
    store = tmp_path / "home" / "store"
    process = pico.start([*pico.arguments("run", settings), "--json"], tmp_path)
    deadline = time.monotonic() + 120
    while len(list(store.glob("decompose/*/*/manifest.json"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not list(store.glob("realise/*/*"))
    result = run(settings)
    computed = pico.counts(result["stages"], "computed")
    assert not {"tokenise", "collect", "whiten"} & set(computed)
    assert computed["decompose"] <= pico.UNITS["decompose"] - 3
    keys = [stage["key"] for stage in result["stages"] if stage["name"] != "register"]
    assert keys == [outcome.key for outcome in cold_walk.outcomes]
    assert pico.payload(store) == pico.payload(cold_walk.session.store.root)


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    return dict(json.loads(out))


def test_two_processes_at_once_on_a_fresh_home(inputs: pico.Inputs, tmp_path: Path) -> None:
    """Also what the command line prints: one JSON value, whatever is logged."""
    home = tmp_path / "home"
    words = [*pico.arguments("run", inputs.settings(home, length=4096)), "--json"]
    noisy = {"PREFECT_LOGGING_LEVEL": "DEBUG", "PYTHONWARNINGS": "always"}
    processes = [pico.start(words, tmp_path, **noisy) for _ in range(2)]
    first, second = (finish(process) for process in processes)
    assert any("the model's context ends there" in note for note in first["notes"])

    def keys(result: dict[str, Any]) -> list[tuple[str, str]]:
        stages = [stage for stage in result["stages"] if stage["name"] != "register"]
        return [(stage["unit"], stage["key"]) for stage in stages]

    assert keys(first) == keys(second)
    assert first["metrics"] == second["metrics"]
    assert first["model_dir"] == second["model_dir"]
    assert {first["registered"]["version"], second["registered"]["version"]} == {1, 2}
    assert pico.scratch_left(home / "store") == []
    assert list((home / "store" / "tmp").iterdir()) == []
    assert os.listdir(home / "models") == [Path(first["model_dir"]).name]
    with closing(sqlite3.connect(home / "prefect" / "prefect.db")) as database:
        tasks = [name for (name,) in database.execute("SELECT state_type FROM task_run")]
        flows = [name for (name,) in database.execute("SELECT state_name FROM flow_run")]
    groups = 2 + 3 * pico.BLOCKS + 1 + pico.BLOCKS + 1 + 2 + 1
    assert tasks == ["COMPLETED"] * 2 * groups
    assert flows == ["Completed"] * 2
    assert pico.walk(inputs.settings(home, length=4096)).computed == {}
