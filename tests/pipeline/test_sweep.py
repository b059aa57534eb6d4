"""Sweeps: what runs share is made once, the plan says so, and reports tell variants apart."""

import csv
import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from flows.commands.plan import plan_as_run_or_sweep
from tests.pipeline import pico
from tests.pipeline.conftest import Run
from tests.pipeline.stored import numbers_in
from tests.report_pages import assert_alone

METHODS = ["ada_svd", "duo_svd", "svd_llm"]
KEPT = [0.8, 0.5]
ONCE = ("tokenise", "collect", "weigh", "decompose")


@pytest.fixture(scope="module")
def settings(inputs: pico.Inputs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return inputs.settings(tmp_path_factory.mktemp("sweep") / "home", methods=METHODS, kept=KEPT)


@pytest.fixture(scope="module")
def planned(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """What the plan said before the sweep."""
    printed: list[Any] = []
    plan_as_run_or_sweep(settings, None, True, printed.append)
    return list(printed[0]["units"])


@pytest.fixture(scope="module")
def results(
    run: Run, settings: dict[str, Any], planned: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    return list(json.loads(json.dumps(run(settings))))


def test_statistics_and_decompositions_are_made_exactly_once(
    results: list[dict[str, Any]],
) -> None:
    runs = [(result["method"], result["kept"]) for result in results]
    assert runs == [(method, kept) for method in METHODS for kept in KEPT]
    for stage in ONCE:
        found = [s for result in results for s in result["stages"] if s["name"] == stage]
        computed = Counter(s["key"] for s in found if s["state"] == "computed")
        assert set(computed.values()) == {1}
        assert computed.keys() == {s["key"] for s in found}
        assert len(computed) == pico.UNITS[stage]
        for result in results[1:]:
            states = {s["state"] for s in result["stages"] if s["name"] == stage}
            assert states == {"cached"}


def test_the_plan_lists_what_is_shared_once(
    planned: list[dict[str, Any]], results: list[dict[str, Any]]
) -> None:
    listed = Counter((unit["stage"], unit["unit"]) for unit in planned if unit["stage"] in ONCE)
    assert set(listed.values()) == {1}
    assert Counter(stage for stage, _ in listed) == {stage: pico.UNITS[stage] for stage in ONCE}
    assert {unit["state"] for unit in planned} == {"run"}
    computed = Counter(
        s["name"]
        for result in results
        for s in result["stages"]
        if s["state"] == "computed" and s["name"] != "register"
    )
    told = Counter(unit["stage"] for unit in planned)
    # contents that turn out equal are found again: never more than the plan said
    assert all(computed[stage] <= told[stage] for stage in computed)
    assert computed.keys() == told.keys()
    for stage in ("allocate", "probe", "measure", "advance", "materialise", "evaluate"):
        assert computed[stage] == told[stage], stage


def test_the_plan_says_so_to_people(
    settings: dict[str, Any],
    results: list[dict[str, Any]],
    inputs: pico.Inputs,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan_as_run_or_sweep({**settings, "home": tmp_path / "home"}, None, False, print)
    lines = capsys.readouterr().out.splitlines()
    for stage in ONCE:
        (line,) = [line for line in lines if line.startswith(f"{stage} ")]
        assert re.match(rf"{stage} +to run +{pico.UNITS[stage]} ", line)
    plan_as_run_or_sweep(settings, None, False, print)
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines[:-1] if not line.startswith((" ", "note"))]  # " " goes on
    assert rows and all(line.split()[1] == "cached" for line in rows)
    assert re.fullmatch(r"0 of \d+ units to run", lines[-1])


def test_the_page_beside_the_table_shows_every_run(
    settings: dict[str, Any], results: list[dict[str, Any]]
) -> None:
    folder = settings["home"] / "reports" / "pico"
    page = assert_alone((folder / "report.html").read_text(encoding="utf-8"))
    saved = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    rows = page.rows["results"][1:]
    assert [name for name, _ in rows] == [run["method"] for run in saved]
    for (_, values), run in zip(rows, saved, strict=True):
        found = run["metrics"]["compressed"]
        sizes = [run[size]["compressed"] for size in ("parameters", "bytes", "memory")]
        assert values == [run["kept"], found["perplexity"], found["kl"], *sizes]
    states = [s["state"] for run in results for s in run["stages"]]
    assert dict(page.rows["time"])["all"][:3] == [
        len(states),
        states.count("computed"),
        states.count("cached"),
    ]
    assert "eigenpress sweep --model" in page.sections["again"]
    for run in results:
        logged = settings["home"] / "mlartifacts" / run["run_id"] / "artifacts" / "sweep.html"
        assert logged.read_bytes() == (folder / "report.html").read_bytes()


def test_budget_and_accounting_of_every_run(results: list[dict[str, Any]]) -> None:
    for result in results:
        parameters = result["parameters"]
        least = 0.9 * result["kept"] * parameters["compressible_dense"]
        stored = parameters["compressible_compressed"]
        assert least < stored <= result["kept"] * parameters["compressible_dense"]
        assert parameters["compressed"] == numbers_in(result["model_dir"])[0]
    assert len({result["model_dir"] for result in results}) == len(results)


def expect_table(file: Path, results: list[dict[str, Any]], budgets: int) -> None:
    """A row per method and a cell per budget, with its perplexity."""
    lines = file.read_text().splitlines()
    for name in {result["method"] for result in results}:
        rows = [line for line in lines if line.startswith(f"| {name} |")]
        assert rows and all(row.count("|") == 2 + budgets for row in rows)
        perplexities = [
            f"{r['metrics']['compressed']['perplexity']:.4g}"
            for r in results
            if r["method"] == name
        ]
        assert len(perplexities) == budgets and all(text in rows[0] for text in perplexities)


def test_the_table_has_a_row_for_a_method_and_a_cell_for_a_budget(
    settings: dict[str, Any], results: list[dict[str, Any]]
) -> None:
    folder = settings["home"] / "reports" / "pico"
    expect_table(folder / "table.md", results, budgets=len(KEPT))
    assert (folder / "perplexity.png").stat().st_size > 10_000


VARIANTS = [  # a plain name, an allocator's, one with options, one of stacks
    "svd_llm",
    "svd_llm@hull",
    "duo_svd@uniform:refit_columns=true",
    "basis_sharing:group=3",
]


def test_reports_name_every_variant(
    run: Run, inputs: pico.Inputs, warm_home: Path, tmp_path: Path
) -> None:
    found = run(
        inputs.settings(warm_home, methods=VARIANTS, kept=[0.5], report=tmp_path / "report")
    )
    assert [result["method"] for result in found] == VARIANTS
    expect_table(tmp_path / "report" / "table.md", found, budgets=1)
    assert not (tmp_path / "report" / "perplexity.png").exists()  # one budget makes no line
    saved = json.loads((tmp_path / "report" / "results.json").read_text())
    assert [(r["method"], r["kept"]) for r in saved] == [(r["method"], r["kept"]) for r in found]
    folders = [Path(result["model_dir"]).name for result in found]
    assert len(set(folders)) == len(found)
    assert all(re.fullmatch(r"[\w.@=+-]+", folder) for folder in folders)
    for result in found:
        artifacts = warm_home / "mlartifacts" / result["run_id"] / "artifacts"
        table = list(csv.DictReader(io.StringIO((artifacts / "allocation.csv").read_text())))
        stored = sum(int(row["parameters"]) for row in table)
        assert stored == result["parameters"]["compressible_compressed"]
        assert (artifacts / "allocation.png").stat().st_size
        columns = sum(int(row["columns"]) for row in table)
        assert (columns > 0) == ("duo_svd" in result["method"])


def test_an_allocator_by_flag_is_part_of_the_name(
    run: Run, inputs: pico.Inputs, warm_home: Path
) -> None:
    result = run(inputs.settings(warm_home, allocate="importance", options={"mrr": "0.4"}))
    assert result["method"] == "svd_llm@importance"
    assert Path(result["model_dir"]).name.startswith("pico-svd_llm@importance-0.6-")
    assert result["options"] == {"mrr": "0.4"}
    same = run(inputs.settings(warm_home, method="svd_llm@importance:mrr=0.4"))
    assert pico.counts(same["stages"], "computed") == {"register": 1}
