"""What people do with a run in codes: plan, targets, recovery, export, bench, report, tracking."""

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compress_core.forms.coded import CODES, ZEROS
from compress_core.hf.speed import Load, in_turns, peak_bytes
from flows.commands import cli
from flows.commands.export import export_folder
from flows.commands.plan import plan_as_run_or_sweep
from flows.report.shown import Allocation, Prediction
from flows.runs.asked import find_asked
from flows.runs.findings import NO_DECOMPOSITION
from flows.runs.page import shown_of
from tests.pipeline import codes, pico
from tests.pipeline.conftest import Run
from tests.pipeline.folders import load, logits_of
from tests.pipeline.test_recover import attributes

KEPT = {
    "svd_llm:bits=4": 0.2,
    "saes_svd:bits=4": 0.2,
    "gptq": 0.3,
    "caldera:turns=2": 0.25,
    "press": 0.25,
}

pytestmark = pytest.mark.usefixtures("code_cache")


@pytest.fixture(scope="module")
def walks(tmp_path_factory: pytest.TempPathFactory) -> codes.Walks:
    return codes.Walks(tmp_path_factory.mktemp("after"))


def written(folder: Path) -> int:
    """Bytes of a folder's tensors."""
    files = [load_file(file) for file in folder.glob("*.safetensors")]
    return sum(tensor.nbytes for tensors in files for tensor in tensors.values())


@pytest.mark.parametrize(
    ("model", "method"), [*(("biased", method) for method in KEPT), ("llama", "svd_llm:bits=4")]
)
def test_a_size_that_is_asked_for_is_held(model: str, method: str, walks: codes.Walks) -> None:
    dense = walks.get(model, "rtn", 0.9).pipeline.job.model
    layers = sum(layer.dense_cost for layer in dense.layout.layers)
    fixed = dense.nbytes - layers * dense.nbytes // dense.parameters
    target = int(fixed + (KEPT[method] + 0.05) * (dense.nbytes - fixed))
    settings = walks.settings(model, method, 0.5) | {"kept": None, "target_bytes": target}
    folder = pico.walk(settings).folder
    found = written(folder)
    assert found <= target
    widest = {"biased": 1.0, "llama": 0.5}[model]  # a code takes half of what float32 is taken for
    steps = 0.75 if method == "gptq" else 0.85  # its widths go by steps
    assert found - fixed > steps * widest * (target - fixed)


@pytest.mark.parametrize("method", [*KEPT, "gptq:mixed=true", "rtn", "press:correct=false"])
def test_a_plan_counts_codes(
    method: str, walks: codes.Walks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed: list[Any] = []
    kept = KEPT.get(method, 0.3)
    given = walks.settings("biased", method, kept) | {"home": tmp_path}
    plan_as_run_or_sweep(given, None, True, printed.append)
    expected = printed[0]["estimate"]
    assert {"realise", "materialise", "evaluate"} <= expected["stages"].keys()
    assert expected["memory"] > 0 and expected["seconds"] > 0
    (model,) = expected["models"]
    walk = walks.get("biased", method, kept)
    assert 0.9 * model < written(walk.folder) <= 1.1 * model
    if method == "press":
        plan_as_run_or_sweep(given, None, False, printed.append)
        assert "realise" in capsys.readouterr().out


def cost_of(settings: dict[str, Any], name: str) -> Any:
    """Of a layer's `realise` unit."""
    pipeline, _, _ = pico.build(settings)
    return pipeline.realised[name].cost


def test_rounding_costs_what_gptq_does(walks: codes.Walks) -> None:
    name = "model.layers.0.mlp.down_proj"  # (32, 56)
    plain = cost_of(walks.settings("llama", "svd_llm", 0.2), name)
    assert plain.products == {}
    near = cost_of(walks.settings("llama", "svd_llm:bits=4:rounding=nearest", 0.2), name)
    assert near.products == {} and near.memory > plain.memory
    whole = cost_of(walks.settings("llama", "gptq", 0.3), name)
    assert whole.products == {"float64": 56.0**3 + 32 * 56**2}
    turn, turns = (
        cost_of(walks.settings("llama", f"caldera:turns={n}", 0.3), name).products["float64"]
        for n in (1, 15)
    )
    assert whole.products["float64"] < turn and turns - 56**3 == 15 * (turn - 56**3)
    both = cost_of(walks.settings("llama", "svd_llm:bits=4", 0.2), name)
    assert both.products["float64"] > whole.products["float64"]
    assert both.memory == near.memory + 48 * 56**2
    assert both.disk == pytest.approx(plain.disk, rel=0.05)  # the same room


@pytest.mark.parametrize(
    ("method", "how"),
    [
        ("press", "factors"),
        ("press", "blocks"),
        ("svd_llm:bits=4", "factors"),
        ("gptq", "blocks"),
        ("caldera:turns=2", "factors"),
    ],
)
def test_a_recovery_trains_scales_and_leaves_codes(
    method: str, how: str, walks: codes.Walks
) -> None:
    settings = walks.settings("llama", method, KEPT[method], recover=how, recover_steps=6)
    before, walk = walks.get("llama", method, KEPT[method]), pico.walk(settings)
    one, other = (load_file(w.folder / "model.safetensors") for w in (before, walk))
    assert one.keys() == other.keys()
    changed = {key for key in one if not torch.equal(one[key], other[key])}
    assert not {key for key in changed if key.endswith((CODES, ZEROS))}
    of_codes = {key.removesuffix(CODES) for key in one if key.endswith(CODES)}
    assert len(of_codes & changed) > len(of_codes) / 2
    reports = [found["report"] for found in attributes(walk, "recover")]
    assert reports and all(report["best"] < report["start"] for report in reports)
    assert logits_of(load(walk.folder, trust=True)).isfinite().all()


def test_the_dense_form_is_what_the_codes_stand_for(walks: codes.Walks, tmp_path: Path) -> None:
    walk = walks.get("llama", "press", KEPT["press"])
    export_folder(walk.folder, "dense", tmp_path / "dense")
    dense = load(tmp_path / "dense")
    assert not any(key.endswith(CODES) for key in dense.state_dict())
    torch.testing.assert_close(logits_of(dense), logits_of(load(walk.folder)), rtol=1e-4, atol=1e-5)


def test_vllm_cannot_have_them(
    walks: codes.Walks,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = walks.get("llama", "gptq", KEPT["gptq"]).folder
    words = ["eigenpress", "export", str(folder), "--to", "vllm", "--output", str(tmp_path / "v")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    assert "numbers in codes" in error and "use --to dense" in error
    assert not (tmp_path / "v").exists()


@pytest.fixture(scope="module")
def results(run: Run, walks: codes.Walks) -> dict[str, dict[str, Any]]:
    """Registered runs, in the home where others have made what they need."""
    methods = {"press": KEPT["press"], "gptq:mixed=true": 0.3, "svd_llm@fisher:bits=4": 0.2}
    return {m: run(walks.settings("biased", m, kept)) for m, kept in methods.items()}


def home_of(walks: codes.Walks) -> Path:
    return Path(walks.settings("biased", "rtn", 0.5)["home"])


def test_the_table_says_the_bits_of_every_layer(
    results: dict[str, dict[str, Any]], walks: codes.Walks
) -> None:
    for method, result in results.items():
        place = home_of(walks) / "mlartifacts" / result["run_id"] / "artifacts" / "allocation.csv"
        rows = {row["layer"]: row for row in csv.DictReader(io.StringIO(place.read_text()))}
        config = json.loads((Path(result["model_dir"]) / "config.json").read_text())
        modules = config["quantization_config"]["modules"]
        for name, row in rows.items():
            widths = set(modules.get(name, {}).get("codes", {"": 16}).values())
            assert row["bits"] == " and ".join(map(str, sorted(widths)))
        assert (
            sum(int(row["parameters"]) for row in rows.values())
            == (result["parameters"]["compressible_compressed"])
        )
        assert method != "svd_llm@fisher:bits=4" or {r["bits"] for r in rows.values()} == {"4"}


def test_a_report_shows_what_was_predicted_and_which_bits_there_are(
    results: dict[str, dict[str, Any]],
    walks: codes.Walks,
    server_environment: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    home = home_of(walks)
    for method, result in results.items():
        (run,) = shown_of(home, find_asked(home, result["run_id"], print))
        assert isinstance(run.allocation, Allocation)
        assert {own["bits"] for own in run.allocation.stored.values()} & {"2", "3", "4", "5", "6"}
        if method.startswith("gptq"):
            assert run.prediction == NO_DECOMPOSITION
        else:
            assert isinstance(run.prediction, Prediction) and run.prediction.divergence
            assert list(run.prediction.shares) == sorted(set(run.prediction.shares))
            told = run.prediction.how.endswith("; what rounding to codes adds is not in it")
            assert told == (method != "press")
            most = 1.0 if method == "press" else 0.3  # of 4 bits and their scales
            assert run.prediction.shares[-1] <= most
        with pico.environment(server_environment):
            words = ["report", result["run_id"], "--home", str(home), "--json"]
            cli.app(words, standalone_mode=False)
        page = Path(json.loads(capsys.readouterr().out)["report"]).read_text(encoding="utf-8")
        assert "Bits of a number: " in page


def test_a_result_says_what_the_list_was_chosen_over(results: dict[str, dict[str, Any]]) -> None:
    """The same room with less on the list; nothing where nothing else was on it."""
    for method, result in results.items():
        others = result.get("passed_over", {})
        if method != "press":
            assert others == {}
            continue
        assert set(others) == {"without entries", "of whole weights in codes alone"}
        assert 0 < result["predicted"] <= min(others.values()) * (1 + 1e-9)
        assert others["without entries"] <= others["of whole weights in codes alone"] * (1 + 1e-9)


def test_its_speed_and_memory_are_measured(walks: codes.Walks) -> None:
    """As `bench` does with any folder."""
    folder, asked = walks.get("biased", "press", KEPT["press"]).folder, Load(1, 8, 2)
    (found,) = in_turns({"small": load(folder)}, [asked], 1)["small"]
    assert found.metrics()["decode_tokens_per_second"] > 0
    assert peak_bytes(folder, asked, "cpu", "bfloat16") > 0
