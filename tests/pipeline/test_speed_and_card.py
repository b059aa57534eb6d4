"""Speed and memory of a published model, its card, and allocations that a device has a say in."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from compress_core.errors import ConfigError, ModelError
from compress_core.hf.speed import Load, Speed, check_load, measure_speed
from flows.commands.bench import Asked, measure, metrics_of, show
from flows.runs import layer_speed
from storage.records import read_record
from tasks.stages.allocate import read_shares
from tasks.tracking.versions import find_version, run_metrics
from tests.pipeline import pico
from tests.pipeline.stored import marks_in


def ranks_of(settings: dict[str, Any]) -> tuple[str, dict[str, int | None]]:
    """Key of the allocation that a configuration comes to, and layer to rank."""
    walk = pico.walk(settings)
    unit = pico.allocation_of(walk.pipeline)
    shares = read_shares(walk.session.artifact(unit))
    return walk.session.manifests[unit].key, {name: s.rank for name, s in shares.items()}


def test_bench_measures_beside_the_dense_model_and_tells_the_registry(
    cold: dict[str, Any], cold_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[str] = []
    asked = Asked(
        cold["registered"]["name"],
        cold_home,
        batch="2",
        prompt_tokens="16",
        new_tokens=3,
        repeats=2,
        device="cpu",
    )
    result = measure(asked, told.append)
    (row,) = result["loads"]
    assert (row["batch"], row["prompt_tokens"], row["new_tokens"]) == (2, 16, 3)
    for which in ("dense", "compressed"):
        assert all(value > 0 for name, value in row[which].items() if name != "spread")
    products = result["products_per_token"]
    saved = cold["parameters"]["compressible_dense"] - cold["parameters"]["compressible_compressed"]
    assert products["dense"] - products["compressed"] == saved + marks_in(cold["model_dir"])
    assert result["ideal_speedup"] == products["dense"] / products["compressed"]
    version = find_version(cold_home, cold["registered"]["name"])
    logged = {n: v for n, v in run_metrics(cold_home, version).items() if n.startswith("speed/")}
    assert logged == pytest.approx(metrics_of(result))
    first = row["compressed"]["decode_tokens_per_second"]
    for place in ("speed/", "speed/batch_2/prompt_16/"):
        assert logged[f"{place}decode_tokens_per_second"] == pytest.approx(first)
    show(result)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_rates_and_quotients_are_of_the_median_turn() -> None:
    dense = Speed(Load(2, 10, 5), prefill=(1.0, 4.0, 2.0), decode=(8.0, 2.0, 4.0))
    other = Speed(Load(2, 10, 5), prefill=(1.0, 1.0, 1.0), decode=(2.0, 2.0, 2.0))
    assert dense.metrics() == {
        "prefill_tokens_per_second": 10.0,
        "decode_tokens_per_second": 2.0,
        "first_token_seconds": 2.0,
    }
    assert (other.faster_than(dense, "prefill"), other.faster_than(dense, "decode")) == (2.0, 2.0)
    assert dense.spread() == {"prefill": 1.0, "decode": 1.0}


def test_what_bench_cannot_measure_it_refuses(inputs: pico.Inputs, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="2 or more new ones; got 1, 8 and 1"):
        measure_speed(inputs.model, prompt_tokens=8, new_tokens=1)
    with pytest.raises(ModelError, match="more than the model's context"):
        check_load(inputs.model, Load(1, 10**6, 2))
    with pytest.raises(ConfigError, match="which model it was made from: give --against DENSE"):
        measure(Asked(str(inputs.model), tmp_path), print)
    asked = Asked(str(inputs.model), tmp_path, against=str(inputs.model), batch="1,x")
    with pytest.raises(ConfigError, match="--batch is one or more numbers above 0"):
        measure(asked, print)


def test_the_card_says_what_the_result_says_and_no_place(
    cold: dict[str, Any], inputs: pico.Inputs
) -> None:
    folder = Path(cold["model_dir"])
    card = ModelCard.load(folder / "README.md")
    (measured,) = card.data.eval_results or []
    assert measured.metric_type == "perplexity"
    assert measured.metric_value == pytest.approx(cold["metrics"]["compressed"]["perplexity"], 1e-5)
    assert card.data.library_name == "transformers"
    assert "license" not in card.data.to_dict()
    text = card.content
    for said in (
        f"{cold['parameters']['compressed']:,}",
        f"`{inputs.calibration.name}`",
        "arxiv.org/abs/2403.07378",
        "--method svd_llm",
        "--kept 0.6",
        "which its folder does not name",
    ):
        assert said in text
    assert str(inputs.model.parent) not in text
    assert str(folder.parents[1]) not in text


def test_a_multiple_and_a_table_decide_ranks_and_key(
    warm_home: Path, inputs: pico.Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = inputs.settings(warm_home, kept=0.8)
    plain_key, _ = ranks_of(settings)
    key, ranks = ranks_of({**settings, "rank_multiple": 4})
    assert key != plain_key
    assert {rank % 4 for rank in ranks.values() if rank is not None} == {0}

    monkeypatch.setattr(layer_speed, "fastest_rank", lambda shape, device, dtype: 6)
    plain = {**settings, "factors": "plain"}  # what the table knows
    plain_key, _ = ranks_of(plain)
    here = {**plain, "allocate": "uniform", "options": {"device": "here"}}
    key, ranks = ranks_of(here)
    assert key != plain_key
    assert max(rank for rank in ranks.values() if rank is not None) <= 6
    assert None in ranks.values()  # what is slower at 0.8 is partly dense instead
    (file,) = (warm_home / "speed").iterdir()
    table = read_record(file)["shapes"]
    monkeypatch.setattr(layer_speed, "fastest_rank", lambda *_: pytest.fail("measured again"))
    assert ranks_of(here) == (key, ranks)
    elsewhere = tmp_path / "table.json"
    elsewhere.write_text(json.dumps({"shapes": table}))
    assert ranks_of({**here, "options": {"device": str(elsewhere)}}) == (key, ranks)

    elsewhere.write_text(json.dumps({"shapes": table[1:]}))
    with pytest.raises(ConfigError, match="says nothing of layers of"):
        ranks_of({**here, "options": {"device": str(elsewhere)}})
    elsewhere.write_text('{"shapes": [{"out": 1}]}')
    with pytest.raises(ConfigError, match="is no table of layers' speed"):
        ranks_of({**here, "options": {"device": str(elsewhere)}})
    with pytest.raises(ConfigError, match="there is no such file; `device=here`"):
        ranks_of({**here, "options": {"device": "nowhere.json"}})


def test_a_layers_own_time_is_measured() -> None:
    assert 0 <= layer_speed.fastest_rank((48, 32), "cpu", "float32") <= 19
