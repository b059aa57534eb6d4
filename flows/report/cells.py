"""Tables of a report's page: sizes and measures, scores, where time went; exact values beside."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flows.report.noise import BEST_OR_NEAR, best_or_near
from flows.report.shown import Shown
from flows.report.tables import kind_part, number
from tasks.engine.stages import STAGES

STDERR = "_stderr"


@dataclass(frozen=True)
class Cell:
    """What people read, and the exact value behind it; the best of its budget is marked."""

    text: str
    value: float | int | None = None
    best: bool = False


@dataclass(frozen=True)
class Head:
    """Heading of a column, and the unit of what is below it."""

    text: str
    unit: str = ""


@dataclass(frozen=True)
class Row:
    """A row by its name; that of the dense model looks quieter."""

    name: str
    cells: Sequence[Cell]
    dense: bool = False


@dataclass(frozen=True)
class Table:
    """A table; the first heading is that of the rows' names."""

    caption: str
    heads: Sequence[Head]
    rows: Sequence[Row]


def results_table(shown: Sequence[Shown]) -> Table:
    """A row per run and one of the dense model: measures on every text, and sizes."""
    first = shown[0].result
    labels = list(first["metrics"]["dense"]["texts"])
    sizes = [("parameters", "millions"), ("bytes", "MB on disk"), ("memory", "MB in memory")]
    sizes = [(name, unit) for name, unit in sizes if name in first]
    heads = [Head("method"), Head("kept")]
    for place, label in enumerate(labels, 1):
        which = f"text {place}" if len(labels) > 1 else label
        heads += [Head("perplexity", which), Head("KL", f"nats/token, {which}")]
    mixed = any("entries" in run.result for run in shown)
    heads += [Head("entries", "% of the layers' numbers")] if mixed else []
    heads += [Head({"parameters": "parameters"}.get(name, "size"), unit) for name, unit in sizes]
    best = {label: best_or_near([run.result for run in shown], label) for label in labels}
    dense = _measures(first, "dense", labels, sizes, best, mixed)
    rows = [Row("dense", [Cell("1", 1.0), *dense], True)]
    for run in shown:
        kept = Cell(f"{run.result['kept']:g}", run.result["kept"])
        for which in [name for name in run.result["metrics"] if name != "dense"]:
            name = run.method if which == "compressed" else f"{run.method} before recovery"
            cells = _measures(run.result, which, labels, sizes, best, mixed)
            rows.append(Row(name, [kept, *cells]))
    return Table(_caption(first, any(best.values())), heads, rows)


def _caption(first: Mapping[str, Any], best: bool) -> str:
    texts = first["metrics"]["dense"]["texts"]
    said = [
        f"{f'text {place} is' if len(texts) > 1 else 'measured on'} {label}, {text['windows']} "
        f"windows of {text['length']} tokens"
        for place, (label, text) in enumerate(texts.items(), 1)
    ]
    told = "; ".join(said or ["nothing was measured on text"])
    what = "share of the whole model" if first["of"] == "model" else "share of the layers"
    bold = f"; bold: {BEST_OR_NEAR}" if best else ""
    return f"{told[0].upper()}{told[1:]}. Kept is the {what} that stays{bold}."


def _measures(
    result: Mapping[str, Any],
    which: str,
    labels: Sequence[str],
    sizes: Sequence[tuple[str, str]],
    best: Mapping[str, Collection[tuple[str, float]]],
    mixed: bool,
) -> Iterable[Cell]:
    for label in labels:
        text = result["metrics"][which]["texts"][label]
        found, kl = text["perplexity"], text.get("kl", 0.0)
        marked = which == "compressed" and (result["method"], result["kept"]) in best[label]
        yield Cell(number(found), found, marked)
        yield Cell(f"{kl:.4f}", kl)
    if mixed:
        part = kind_part(result) if which != "dense" else ""
        yield Cell(part or "–", result["entries"] if part else None)
    for name, _ in sizes:
        stored = result[name]["dense" if which == "dense" else "compressed"]
        yield Cell(f"{stored / 1e6:,.2f}", stored)


def scores_table(results: Sequence[Mapping[str, Any]]) -> Table | None:
    """A row per run, a column per task and measure, with standard errors; None without tasks."""
    tasks = results[0]["metrics"]["dense"]["tasks"]
    columns = [
        (task, measure)
        for task, scores in tasks.items()
        for measure in scores
        if not measure.endswith(STDERR)
    ]
    if not columns:
        return None
    dense = results[0]["metrics"]["dense"]
    rows = [Row("dense", [_score(dense["tasks"][task], name) for task, name in columns], True)]
    for run in results:
        scores = run["metrics"]["compressed"]["tasks"]
        label = f"{run['method']} kept {run['kept']:g}"
        rows.append(Row(label, [_score(scores[task], name) for task, name in columns]))
    asked = results[0].get("asked", {})
    how = [f"{asked['task_limit']} documents per task"] if asked.get("task_limit") else []
    how += [f"{asked['num_fewshot']} examples"] if asked.get("num_fewshot") is not None else []
    how += ["through the chat template"] if asked.get("apply_chat_template") else []
    caption = "Scores of lm-eval tasks ± their standard error" + "".join(f"; {h}" for h in how)
    heads = [Head("model"), *(Head(name, task) for task, name in columns)]
    return Table(f"{caption}.", heads, rows)


def _score(scores: Mapping[str, float], name: str) -> Cell:
    value = scores[name]
    error = scores.get(f"{name}{STDERR}")
    beside = f" ± {error:.3f}" if error is not None and math.isfinite(error) else ""
    return Cell(f"{number(value) if abs(value) >= 10 else f'{value:.3f}'}{beside}", value)


def blocks_table(shown: Sequence[Shown]) -> Table:
    """A row per block: the held-back error of its outputs before and after its own recovery.

    Args:
        shown: Runs with curves of "blocks".
    """
    runs = [
        (run.curves["blocks"]["block_start"], run.curves["blocks"]["block_best"]) for run in shown
    ]
    rows = [
        Row(f"block {block}", [_change(start[block], best[block]) for start, best in runs])
        for block in range(len(runs[0][0]))
    ]
    return Table(
        "Squared error of the blocks' outputs on text held back, relative to the dense model's, "
        "before and after each was trained by itself.",
        [Head("block"), *(Head(run.method, f"kept {run.result['kept']:g}") for run in shown)],
        rows,
    )


def _change(start: float, best: float) -> Cell:
    if math.isnan(start):
        return Cell("dense")
    return Cell(f"{number(start)} → {number(best)}", best)


def seconds_of(run: Shown) -> dict[str, float]:
    """Stage to the seconds that a run spent in it."""
    found: dict[str, float] = {}
    for stage in run.result.get("stages", ()):
        found[stage["name"]] = found.get(stage["name"], 0.0) + stage["seconds"]
    return found


def times_table(shown: Sequence[Shown]) -> Table | None:
    """A row per stage: units, how many were computed and found, seconds; None without records."""
    stages = [stage for run in shown for stage in run.result.get("stages", ())]
    if not stages:
        return None
    rows = []
    there = {stage["name"] for stage in stages}
    for name in [*(stage for stage in STAGES if stage in there), *sorted(there - set(STAGES))]:
        rows.append(Row(name, _counted([stage for stage in stages if stage["name"] == name])))
    rows.append(Row("all", _counted(stages)))
    of = f"all {len(shown)} runs together" if len(shown) > 1 else "this run"
    return Table(
        f"Units of {of}. What one run has computed the next one finds.",
        [Head("stage"), Head("units"), Head("computed"), Head("cached"), Head("time", "s")],
        rows,
    )


def _counted(stages: Sequence[Mapping[str, Any]]) -> list[Cell]:
    cached = sum(stage["state"] == "cached" for stage in stages)
    seconds = math.fsum(stage["seconds"] for stage in stages)
    counts = [len(stages), len(stages) - cached, cached]
    return [*(Cell(f"{count:,}", count) for count in counts), Cell(f"{seconds:,.1f}", seconds)]
