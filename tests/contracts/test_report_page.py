"""A report's page: rendered from what a run left, by itself, whatever the names and texts are."""

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress_core.types import LayerRef
from flows.commands import cli
from flows.report.page import render_page
from flows.report.shown import Allocation, Prediction, Sample, Shown, Spectra
from flows.runs.artifacts import Progress
from flows.settings.command import run_command, sweep_command
from flows.settings.config import RunConfig, SweepConfig, build_config
from tests.report_pages import assert_alone

SECTIONS = ["results", "quality", "prediction", "allocation", "spectra", "training", "scores"]
SECTIONS += ["samples", "time", "again"]
HOSTILE = "</svg><script>alert(1)</script>"
KINDS = ("self_attn.q_proj", "mlp.up_proj")
LAYERS = [
    LayerRef(f"model.layers.{b}.{kind}", b, 8, 8, tap=kind) for b in range(3) for kind in KINDS
]


def result(method: str, kept: float, perplexity: float, text: str = "a.txt") -> dict[str, Any]:
    def texts(found: float, kl: float) -> dict[str, Any]:
        own = {"perplexity": found, "kl": kl, "windows": 4, "length": 32}
        scores = {"acc": 0.5, "acc_stderr": 0.125}
        return {"texts": {text: own}, "tasks": {"quiz": scores}, "perplexity": found, "kl": kl}

    whole = {"dense": 1000, "compressible_dense": 384}
    return {
        "model": "pico",
        "method": method,
        "kept": kept,
        "of": "compressible",
        "seed": 3,
        "compute": "float32",
        "code_version": "1",
        "parameters": {**whole, "compressed": 900, "compressible_compressed": int(kept * 384)},
        "bytes": {"dense": 4000, "compressed": int(4000 * kept)},
        "memory": {"dense": 4000, "compressed": 3600},
        "metrics": {"dense": texts(7.125, 0.0), "compressed": texts(perplexity, 0.25)},
        "stages": [
            {"name": "evaluate", "unit": "x", "key": "0", "state": "computed", "seconds": 1.5},
            {"name": "decompose", "unit": "y", "key": "1", "state": "cached", "seconds": 0.25},
        ],
        "notes": [],
    }


def shown(found: dict[str, Any]) -> Shown:
    stored = {
        layer.name: {"rank": 3, "columns": 0, "entries": 0, "numbers": 48, "bits": "16"}
        for layer in LAYERS
    }
    values = {layer.name: np.linspace(2.0, 0.1, 8) for layer in LAYERS}
    return Shown(
        found,
        {"method": found["method"]},
        "2026-01-02T03:04:05",
        Allocation(LAYERS, stored),
        Prediction([0.4, 0.8], [0.5, 0.1], [0.3, 0.01], "its own"),
        Spectra("one", values),
        {"learn": {"kl": [1.0, 0.5], "kept": [1.0, 0.6]}},
    )


def test_a_page_has_every_section_and_every_number() -> None:
    runs = [shown(result(m, k, 10.0 * k)) for m in ("svd", "svd_llm@hull") for k in (0.8, 0.4)]
    text = render_page("a sweep", runs, [Sample("once", {"dense": "upon"})], ["eigenpress x"])
    page = assert_alone(text)
    assert list(page.sections) == SECTIONS
    rows = page.rows["results"]
    assert [name for name, _ in rows] == ["dense", *(run.method for run in runs)]
    for (_, values), run in zip(rows[1:], runs, strict=True):
        kept, perplexity = run.result["kept"], run.result["metrics"]["compressed"]["perplexity"]
        assert values == [kept, perplexity, 0.25, 900, 4000 * kept, 3600]
    assert page.rows["scores"][1][0] == "svd kept 0.8"
    assert "0.500 ± 0.125" in page.sections["scores"]
    assert dict(page.rows["time"])["all"] == [8.0, 4.0, 4.0, 7.0]
    assert "upon" in page.sections["samples"] and "eigenpress x" in page.sections["again"]
    assert text.count("<svg") == 2 + 2 + 4 + 2 + 1 + 1


def test_what_is_gone_is_said_in_its_place() -> None:
    bare = {k: v for k, v in result("svd", 0.5, 9.0).items() if k not in ("stages", "memory")}
    page = assert_alone(
        render_page("t", [Shown(bare, None, "", "gone 1", "gone 2", "gone 3")], "gone 4", [])
    )
    for number, section in enumerate(("allocation", "prediction", "spectra", "samples"), 1):
        assert f"gone {number}" in page.sections[section]
    assert page.rows["results"][1][1] == [0.5, 9.0, 0.25, 900, 2000]
    assert page.sections["training"].count("Nothing was trained") == 1


def test_blocks_that_were_trained_one_by_one_have_a_row_each() -> None:
    curves = {"block_start": [0.25, float("nan"), 0.5], "block_best": [0.125, float("nan"), 0.4]}
    run = replace(shown(result("svd+blocks", 0.5, 9.0)), curves={"blocks": curves})
    page = assert_alone(render_page("t", [run], "", []))
    assert page.rows["training"] == [("block 0", [0.125]), ("block 1", []), ("block 2", [0.4])]
    words = page.sections["training"]
    assert "0.2500 → 0.1250" in words and "dense" in words and "0.5000 → 0.4000" in words
    assert "Nothing was trained" not in words


def test_there_may_be_more_methods_than_colours() -> None:
    runs = [shown(result(f"method{n}", 0.5, 9.0 + n)) for n in range(12)]
    bare = [replace(run, allocation="x", spectra="y", curves={}) for run in runs]
    page = assert_alone(render_page("t", bare, "", []))
    assert "5 more methods are grey" in page.sections["quality"]
    assert "method6" in page.sections["quality"] and "method7" not in page.sections["quality"]
    assert len(page.rows["results"]) == 13


def test_a_run_that_exploded_does_not_flatten_the_others() -> None:
    found = {0.9: 9.0, 0.8: 10.0, 0.7: 11.0, 0.6: 9000.0}
    runs = [shown(result("svd", kept, perplexity)) for kept, perplexity in found.items()]
    bare = [replace(run, allocation="x", spectra="y", curves={}) for run in runs]
    words = assert_alone(render_page("t", bare, "", [])).sections["quality"]
    assert "1 of 4 runs lie above the picture" in words
    numbers = [float(word.replace("−", "-")) for word in re.findall(r"^[−\d.]+$", words, re.M)]
    assert {8.0, 9.0, 10.0, 11.0} <= set(numbers)  # marks of perplexity; the dense model has 7.1
    assert min(numbers) >= 0 and max(numbers) < 20


def test_the_same_run_makes_the_same_page() -> None:
    run = shown(result("svd", 0.5, 9.0))
    assert render_page("t", [run], "", []) == render_page("t", [run], "", [])


def test_names_and_texts_are_words_and_secrets_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "swordfish-9")
    found = result(f"svd:{HOSTILE}", 0.5, 9.0, text=f"{HOSTILE}.txt")
    sample = Sample(f"{HOSTILE}\x00", {"dense": f"swordfish-9 {HOSTILE}"})
    text = render_page(HOSTILE, [shown(found)], [sample], ["run --x swordfish-9"])
    page = assert_alone(text)
    assert "<script" not in text and "swordfish" not in text and "\x00" not in text
    assert HOSTILE in page.sections["samples"] and page.rows["results"][1][0] == found["method"]


def given_by(monkeypatch: pytest.MonkeyPatch, line: str, kind: Any) -> Any:
    """The configuration that the command line makes of a line."""
    seen: list[Any] = []
    monkeypatch.setattr(cli, "execute", lambda settings, as_json: seen.append(settings))
    cli.app(shlex.split(line)[1:], standalone_mode=False)
    assert isinstance(seen[0], kind)
    return seen[0]


def test_the_command_makes_the_same_configuration(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = {
        "model": "my model",
        "method": "svd_llm:update=u",
        "kept": 0.123456,
        "calibration": "it's.txt",
        "eval_text": ["a.txt", "b.txt"],
        "options": {"prefix": "block"},
        "bos": True,
        "batch_size": 4,
        "target_bytes": None,
        "home": tmp_path / "home",
        "output": tmp_path / "out",
    }
    config = build_config(RunConfig, settings, None)
    again = given_by(monkeypatch, run_command(config.model_dump(mode="json")), RunConfig)
    assert again.model_dump() == config.model_dump()


def test_one_command_makes_a_whole_sweep_again(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {
        "model": "m",
        "methods": ["svd", "svd_llm@hull:probe_windows=4"],
        "kept": [0.8, 0.5],
    }
    sweep = build_config(SweepConfig, {**settings, "calibration": "a.txt"}, None)
    configs = [run.model_dump(mode="json") for run in sweep.runs()]
    (line,) = sweep_command(configs)
    assert given_by(monkeypatch, line, SweepConfig).model_dump() == sweep.model_dump()
    lines = sweep_command(configs[1:])  # no sweep makes three of them
    assert [line.split()[1] for line in lines] == ["run"] * 3


def test_a_prefect_that_takes_no_artifact_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no room\nfor more")

    monkeypatch.setattr("prefect.artifacts.create_progress_artifact", refuse)
    monkeypatch.setattr("flows.runs.artifacts.EVERY", 0.0)
    notes: list[str] = []
    progress = Progress(3, notes.append)
    for _ in range(3):
        progress.advance("decompose", 1)
    assert notes == ["Prefect does not show this run's numbers (no room); the run goes on"]


def test_it_is_said_how_many_layers_are_of_entries_and_how_many_of_components() -> None:
    own = {"rank": 3, "columns": 0, "entries": 0, "numbers": 48, "bits": "16"}
    stored = {layer.name: own for layer in LAYERS}
    assert Allocation(LAYERS, stored).kinds == ""
    stored[LAYERS[0].name] = {**own, "rank": 0, "entries": 48}
    kinds = Allocation(LAYERS, stored).kinds
    rest, total = len(LAYERS) - 1, len(LAYERS)
    assert kinds == f" Sparse entries in 1 of {total} layers, components in {rest}."
    stored[LAYERS[1].name] = {**own, "rank": 0, "columns": 4}
    both = Allocation(LAYERS, stored).kinds
    of_columns = f"kept columns alone in 1, components in {rest - 1}"
    assert both == f" Sparse entries in 1 of {total} layers, {of_columns}."
    stored[LAYERS[0].name] = {**own, "columns": 2}
    alone = Allocation(LAYERS, stored).kinds
    assert alone == f" Kept columns alone in 1 of {total} layers, components in {rest}."
