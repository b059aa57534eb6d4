"""Budgets that are not a share: bytes of the compressed weights, a perplexity to stay within."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress_core.errors import BudgetError
from flows.commands import cli
from flows.commands.plan import plan_as_run_or_sweep
from flows.runs.target import TOLERANCE
from flows.settings.config import RunConfig
from flows.settings.reading import write_yaml
from tests.pipeline import pico
from tests.pipeline.conftest import Run

COMPONENT = 4 * (56 + 32)  # bytes of one of the largest, float32


@pytest.fixture(scope="module")
def nbytes(inputs: pico.Inputs) -> int:
    """Bytes of the dense weights."""
    return bytes_in(inputs.model)


def bytes_in(folder: Path) -> int:
    tensors = [t for f in folder.glob("*.safetensors") for t in load_file(f).values()]
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize(
    ("method", "share"),
    [
        ("svd_llm@by_type", 0.5),
        ("svd_llm@by_type", 0.8),
        ("svd_llm@knapsack", 0.8),
        ("ada_svd", 0.5),
    ],
)
def test_bytes_are_met_from_below(
    method: str, share: float, nbytes: int, inputs: pico.Inputs, warm_home: Path
) -> None:
    target = int(share * nbytes)
    settings = inputs.settings(warm_home, method=method, kept=None, target_bytes=target)
    walk = pico.walk(settings)
    written = walk.session.artifact(walk.pipeline.folder).attrs["bytes"]
    assert written == bytes_in(walk.folder)
    assert target - COMPONENT <= written <= target
    assert f"--target-bytes {target:,} is kept=" in walk.problems[-1]


def test_uniform_floors_every_layer_and_stays_below(
    nbytes: int, inputs: pico.Inputs, warm_home: Path
) -> None:
    target = int(0.7 * nbytes)
    walk = pico.walk(inputs.settings(warm_home, kept=None, target_bytes=target))
    least = target - 21 * COMPONENT
    assert least < bytes_in(walk.folder) <= target


@pytest.mark.parametrize(
    ("method", "share"),
    [("wanda", 0.5), ("wanda", 0.8), ("hassle_free:iterations=3", 0.8)],
)
def test_places_of_sparse_entries_fit_too(
    method: str, share: float, nbytes: int, inputs: pico.Inputs, warm_home: Path
) -> None:
    target = int(share * nbytes)
    settings = inputs.settings(warm_home, method=method, kept=None, target_bytes=target)
    walk = pico.walk(settings)
    compressible = sum(layer.dense_cost for layer in walk.pipeline.job.model.layout.layers)
    found = bytes_in(walk.folder)
    assert target - compressible // 8 - 21 * COMPONENT < found <= target
    assert any(
        key.endswith(".sparse_values") for key in load_file(walk.folder / "model.safetensors")
    )


def test_kept_columns_and_their_indices_count(
    nbytes: int, inputs: pico.Inputs, warm_home: Path
) -> None:
    target = int(0.8 * nbytes)
    settings = inputs.settings(
        warm_home, method="duo_svd:refit_columns=true:accept=0", kept=None, target_bytes=target
    )
    walk = pico.walk(settings)
    assert any(
        key.endswith(".column_index") for key in load_file(walk.folder / "model.safetensors")
    )
    assert target - 21 * 2 * COMPONENT < bytes_in(walk.folder) <= target


def test_more_bytes_than_the_model_has_leave_it_dense(
    nbytes: int, inputs: pico.Inputs, warm_home: Path
) -> None:
    walk = pico.walk(inputs.settings(warm_home, kept=None, target_bytes="1GiB"))
    assert walk.pipeline.config.kept == 1.0
    assert bytes_in(walk.folder) == nbytes
    assert walk.metrics()["kl"] == 0


@pytest.mark.parametrize(("size", "same"), [("90KB", "90000"), ("90kib", str(90 * 1024))])
def test_a_size_with_a_unit_is_the_same_run(
    size: str, same: str, inputs: pico.Inputs, home: Path
) -> None:
    pipelines = [
        pico.build(inputs.settings(home, kept=None, target_bytes=text))[0] for text in (size, same)
    ]
    shares = [pipeline.config.kept for pipeline in pipelines]
    assert shares[0] == shares[1] and 0.5 < (shares[0] or 0) < 1


def test_a_plan_knows_what_bytes_lead_to(
    nbytes: int, inputs: pico.Inputs, warm_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = int(0.7 * nbytes)
    given = {k: v for k, v in inputs.settings(warm_home).items() if k != "kept"}
    printed: list[Any] = []
    plan_as_run_or_sweep(given | {"target_bytes": str(target)}, None, False, printed.append)
    told = capsys.readouterr().out
    assert f"note         --target-bytes {target:,} is kept=" in told
    plan_as_run_or_sweep(given | {"target_bytes": str(target)}, None, True, printed.append)
    walk = pico.walk(given | {"target_bytes": target})
    todo = {(u["stage"], u["unit"]) for u in printed[0]["units"] if u["state"] != "cached"}
    assert {stage for stage, _ in todo} == set(walk.computed)


def test_what_is_run_is_written_as_a_share_and_can_be_repeated(
    run: Run, nbytes: int, inputs: pico.Inputs, warm_home: Path, tmp_path: Path
) -> None:
    settings = inputs.settings(warm_home, kept=None, target_bytes=int(0.7 * nbytes))
    result = run(settings)
    assert result["bytes"]["compressed"] <= 0.7 * nbytes
    assert 0 < result["kept"] < 1 and result["of"] == "compressible"
    config = Path(result["model_dir"]) / "eigenpress.yaml"
    assert (
        f"kept: {result['kept']}" in config.read_text()
        and "target_bytes: null" in config.read_text()
    )
    again = pico.walk(inputs.settings(warm_home, kept=result["kept"]))
    assert again.computed == {}
    assert again.keys[("materialise", "model")] in {s["key"] for s in result["stages"]}


@pytest.fixture(scope="module")
def trained(inputs: pico.Inputs, tmp_path_factory: pytest.TempPathFactory) -> pico.Inputs:
    """A model that has learned its text a little, so that compression costs perplexity."""
    made = pico.copy_inputs(inputs, tmp_path_factory.mktemp("trained"))
    model: Any = AutoModelForCausalLM.from_pretrained(made.model).train()
    tokenizer: Any = AutoTokenizer.from_pretrained(made.model)
    tokens = torch.tensor(tokenizer(made.calibration.read_text())["input_ids"])
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        starts = torch.randint(len(tokens) - 48, (16,), generator=generator).tolist()
        batch = torch.stack([tokens[start : start + 48] for start in starts])
        optimiser.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimiser.step()
    model.eval().save_pretrained(made.model)
    return made


def search_settings(trained: pico.Inputs, home: Path, target: float, **more: Any) -> dict[str, Any]:
    """A search on the text that was learned; another text is evaluated on in the end."""
    texts = [str(trained.calibration), str(trained.evaluation)]
    return trained.settings(home, kept=None, target_perplexity=target, eval_text=texts, **more)


@pytest.fixture(scope="module")
def search(
    run: Run, trained: pico.Inputs, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of a search, and its result."""
    home = tmp_path_factory.mktemp("search") / "home"
    settings = search_settings(trained, home, 22.5, method="ada_svd")
    return settings, run(settings)


def test_the_found_share_is_the_smallest_that_meets_it(
    search: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    settings, result = search
    assert result["target"]["perplexity"] == 22.5
    tried = dict(result["target"]["tried"])
    assert list(tried) == sorted(tried) and max(tried) == 1.0
    assert tried[1.0] == result["metrics"]["dense"]["texts"]["calibration.txt"]["perplexity"] < 22.5
    assert tried[result["kept"]] == result["metrics"]["compressed"]["perplexity"] <= 22.5
    below = [kept for kept in tried if kept < result["kept"]]
    assert result["kept"] - max(below) <= TOLERANCE + 1e-4
    assert all(tried[kept] is None or tried[kept] > 22.5 for kept in below)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert set(result["metrics"]["compressed"]["texts"]) == {"evaluation.txt", "calibration.txt"}
    assert pico.scratch_left(settings["home"] / "store") == []


def test_a_second_search_computes_nothing(
    run: Run, search: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    settings, first = search
    store = pico.tree(settings["home"] / "store")
    again = run(settings)
    assert pico.counts(again["stages"], "computed") == {"register": 1}
    assert again["target"] == first["target"]
    assert again["model_dir"] == first["model_dir"]
    assert pico.tree(settings["home"] / "store") == store


def test_a_search_collects_and_decomposes_once(
    search: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    settings, result = search
    for stage in ("collect", "weigh", "decompose"):
        made = list((settings["home"] / "store" / stage).glob("*/*/manifest.json"))
        assert len(made) == pico.UNITS[stage]
    steps = len(result["target"]["tried"]) - 1
    made = list((settings["home"] / "store" / "materialise").glob("*/*/manifest.json"))
    assert steps > 5 and len(made) <= steps


def test_shares_too_small_for_the_method_are_passed_by(
    run: Run, trained: pico.Inputs, home: Path
) -> None:
    """A target that anything meets ends at the smallest share that a method can have."""
    result = run(search_settings(trained, home, 1e9))
    tried = dict(result["target"]["tried"])
    assert [kept for kept in tried if tried[kept] is None] == [
        k for k in tried if k < result["kept"]
    ]
    assert 32 * 16 * result["kept"] // 48 == 1  # k_proj is down to one component
    json.dumps(result, allow_nan=False)


def test_a_target_below_the_dense_model_is_one_line_before_anything_is_collected(
    run: Run,
    server_environment: dict[str, str],
    trained: pico.Inputs,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = search_settings(trained, home, 5)
    del settings["kept"]
    words = pico.arguments("run", settings)
    monkeypatch.setattr(sys, "argv", ["eigenpress", *words[words.index("run") :]])
    with pico.environment(server_environment), pytest.raises(SystemExit) as ended:
        cli.main()
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.count("eigenpress: ") == 1
    line = error.splitlines()[-1]
    assert line.startswith("eigenpress: --target-perplexity 5 cannot be reached: the dense model ")
    stages = {path.name for path in (home / "store").iterdir() if path.is_dir()}
    assert stages == {"tokenise", "evaluate", "index", "leases", "tmp"}


def test_a_target_that_the_method_cannot_reach_is_one_line(
    run: Run, trained: pico.Inputs, home: Path
) -> None:
    with pytest.raises(BudgetError) as refusal:
        run(search_settings(trained, home, 20, method="svd:factors=plain"))
    line = str(refusal.value)
    assert "--target-perplexity 20 cannot be reached: svd:factors=plain at kept=0.99 has 2" in line
    assert line.endswith("take another method or target") and "\n" not in line


def test_a_deployment_searches_too(
    server_environment: dict[str, str], trained: pico.Inputs, home: Path
) -> None:
    """The flow `eigenpress run`, started without the command line."""
    from flows.runs.execute import run_flow

    settings = search_settings(trained, home, 5)
    refused = pytest.raises(BudgetError, match="--target-perplexity 5 cannot be reached")
    with pico.environment(server_environment), refused:
        run_flow(RunConfig(**settings))


def test_the_configuration_of_a_search_reads_back(inputs: pico.Inputs, tmp_path: Path) -> None:
    config = RunConfig(**inputs.settings(tmp_path, kept=None, target_perplexity=12.5))
    write_yaml(config, tmp_path / "run.yaml")
    assert "target_perplexity: 12.5" in (tmp_path / "run.yaml").read_text()
