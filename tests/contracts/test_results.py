"""Every figure in the tables of docs/results/README.md stands in the results beside it."""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.runs.foretold import FISHER_MISSES, PRESS_MISSES, SEEN

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
ROUNDED = 5.1e-4  # four significant digits
TEXTS = {"WikiText-2 test": 1}  # place among a run's texts; others are the first
MORE_TEXT = "babyllama-1m-stacked"  # calibrated on four times what its namesakes are
SAID_ABOVE = re.compile(  # in the lines above the tables
    ":(group=[0-9]|probe_windows=8|factors=plain)(?=[:+]|$)"
)

Runs = dict[tuple[str, str, float], list[dict[str, Any]]]
Table = list[list[str]]


def recorded() -> Runs:
    """Model, method and kept to the runs that are on record."""
    runs: Runs = defaultdict(list)
    for file in sorted(RESULTS.glob("*/results.json")):
        if file.parent.name == MORE_TEXT:
            continue
        for run in json.loads(file.read_text()):
            method = SAID_ABOVE.sub("", run["method"])
            runs[run["model"], method, run["kept"]].append(run)
    return runs


RUNS = recorded()


def tables() -> Iterator[Table]:
    """Cells of every table under "Tables", the header first."""
    section = (RESULTS / "README.md").read_text().split("## Tables\n")[1].split("\n## ")[0]
    for block in re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE):
        rows = [
            [cell.strip().replace("*", "") for cell in line.strip("|").split("|")]
            for line in block.splitlines()
        ]
        yield [row for row in rows if set(row[0]) != {"-"}]


def perplexity(run: dict[str, Any], text: int = 0, state: str = "compressed") -> float:
    return float(list(run["metrics"][state]["texts"].values())[text]["perplexity"])


def check(cell: str, model: str, method: str, kept: float, text: int = 0) -> None:
    """One cell: a perplexity, or two of them around an arrow: before and after recovery.

    Behind it, in percent, the part of the layers' numbers that entries are, where there is one.
    """
    runs = RUNS[model, method, kept]
    assert runs, f"no run of {method} on {model} at {kept}"
    cell, _, part = cell.partition(" (")
    if part:
        assert all(part == f"{100 * run['entries']:.0f} %)" for run in runs), (model, method)
    states = ("unrecovered", "compressed") if "→" in cell else ("compressed",)
    for state, number in zip(states, cell.split("→"), strict=True):
        for run in runs:
            found = perplexity(run, text, state)
            assert float(number) == pytest.approx(found, rel=ROUNDED), (model, method, kept)


def shares(header: list[str]) -> dict[int, float]:
    """Column to its share."""
    return {
        place: float(name.split()[1])
        for place, name in enumerate(header)
        if name.startswith("kept ")
    }


def check_rows_of_models(header: list[str], rows: Table) -> None:
    model, text = "", 0
    for row in rows:
        if row[0]:
            model, _, named = row[0].partition(", ")
            text = TEXTS.get(named, 0)
            run = RUNS[model, row[2], min(shares(header).values()) if text else 0.6][0]
            assert float(row[1]) == pytest.approx(perplexity(run, text, "dense"), rel=ROUNDED)
        for place, kept in shares(header).items():
            if row[place] != "–":
                check(row[place], model, row[2], kept, text)


def check_one_model(header: list[str], rows: Table) -> None:
    model, _, dense = header[0].partition(", ")
    for row in rows:
        for place, kept in shares(header).items():
            check(row[place], model, row[0], kept)
    if dense:
        number = float(dense.partition("(dense ")[2].rstrip(")"))
        run = RUNS[model, rows[0][0], next(iter(shares(header).values()))][0]
        assert number == pytest.approx(perplexity(run, state="dense"), rel=ROUNDED)


def check_columns_of_models(header: list[str], rows: Table) -> None:
    """At kept 0.5; the last two columns are bytes of the first model, on disk and in memory."""
    for row in rows:
        for place, model in enumerate(header[1:-2], start=1):
            if row[place] != "–":
                check(row[place], model, row[0], 0.5)
        if row[-1] == "–":
            continue
        sizes = [float(cell) * 1e6 for cell in row[-2:]]
        found = [
            [run[what]["compressed"] for what in ("bytes", "memory")]
            for run in RUNS[header[1], row[0], 0.5]
            if "memory" in run
        ]
        assert found and all(sizes == pytest.approx(pair, abs=0.0051e6) for pair in found)


def test_every_figure_of_the_tables_is_on_record() -> None:
    checked = 0
    for header, *rows in tables():
        if header[-1] == "in memory":
            check_columns_of_models(header, rows)
        elif header[0] == "model, text":
            check_rows_of_models(header, rows)
        else:
            check_one_model(header, rows)
        checked += 1
    assert checked >= 8


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (r"press.*", PRESS_MISSES),
        (r"\w+@fisher(:factors=\w+)?", FISHER_MISSES),
    ],
)
def test_what_predictions_miss_is_what_plan_says(rows: str, said: tuple[float, float]) -> None:
    misses = []
    for run in (run for runs in RUNS.values() for run in runs):
        if "predicted" in run and re.fullmatch(rows, run["method"].split("+")[0]):
            cut = run["metrics"].get("unrecovered", run["metrics"]["compressed"])
            kl = next(iter(cut["texts"].values()))["kl"]
            if kl > SEEN:
                misses.append(kl / run["predicted"])
    assert (round(min(misses), 1), round(max(misses), 1)) == said
