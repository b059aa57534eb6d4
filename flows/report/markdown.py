"""A sweep as Markdown: methods in rows, budgets in columns, a table per text, and what it took."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from flows.report.cells import scores_table
from flows.report.noise import BEST_OR_NEAR, best_or_near
from flows.report.spent import HOUR, SPENT, spent_of
from flows.report.tables import kind_part

Results = Sequence[Mapping[str, Any]]
NOT_MEASURED = "–"


def markdown_table(results: Results) -> str:
    """Perplexity and KL on every text, scores of tasks, sizes, trainings, CPU time."""
    lines = []
    for label in results[0]["metrics"]["dense"]["texts"]:
        lines += [*_text(results, label), ""]
    lines += scores(results)
    lines += _predicted(results)
    lines += _whole(results)
    lines += _learned(results)
    lines += _took(results)
    return "\n".join(lines) + "\n"


def grid(results: Results, cell: Callable[[Mapping[str, Any]], str]) -> list[str]:
    """A table of one cell per run."""
    budgets = sorted({result["kept"] for result in results}, reverse=True)
    runs = {(result["method"], result["kept"]): result for result in results}
    lines = [
        "",
        "| method | " + " | ".join(f"kept {kept:g}" for kept in budgets) + " |",
        "|---|" + "---|" * len(budgets),
    ]
    for method in dict.fromkeys(result["method"] for result in results):
        cells = [
            cell(runs[method, kept]) if (method, kept) in runs else NOT_MEASURED for kept in budgets
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def _text(results: Results, label: str) -> list[str]:
    first = results[0]
    dense = first["metrics"]["dense"]["texts"][label]
    entries = (
        " Of what stores components and entries: entries' part of the layers' numbers."
        if any("entries" in result for result in results)
        else ""
    )
    marked = best_or_near(results, label)
    bold = f" Bold: {BEST_OR_NEAR}." if marked else ""
    return [
        f"{first['model']} on {label}: perplexity (KL to the dense model, nats per token), "
        f"{dense['windows']} windows of {dense['length']} tokens, seed {first['seed']}; "
        f"dense {dense['perplexity']:.4g}.{entries}{bold}",
        *grid(results, lambda result: _measured(result, label, marked)),
    ]


def _measured(result: Mapping[str, Any], label: str, marked: Collection[tuple[str, float]]) -> str:
    """Perplexity and KL on a text; with what a recovery began with before it."""
    metrics, part = result["metrics"], kind_part(result)
    text = metrics["compressed"]["texts"][label]
    perplexity = f"{text['perplexity']:.4g}"
    if (result["method"], result["kept"]) in marked:
        perplexity = f"**{perplexity}**"
    found = f"{perplexity} ({text['kl']:.3f}{f'; {part} % entries' if part else ''})"
    if "unrecovered" in metrics:
        found = f"{metrics['unrecovered']['texts'][label]['perplexity']:.4g} → {found}"
    return found


def scores(results: Results) -> list[str]:
    """Scores of tasks with their standard errors, a row per run; nothing without tasks."""
    table = scores_table(results)
    if table is None:
        return []
    heads = [f"{head.text} {head.unit}".strip() for head in table.heads]
    rows = [f"| {row.name} | {' | '.join(cell.text for cell in row.cells)} |" for row in table.rows]
    return [table.caption, "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *rows, ""]


def _predicted(results: Results) -> list[str]:
    """Predictions beside what was measured; nothing where none was made."""
    rows = [result for result in results if "predicted" in result]
    if not rows:
        return []
    label = next(iter(results[0]["metrics"]["dense"]["texts"]))

    def cell(result: Mapping[str, Any]) -> str:
        metrics = result["metrics"]
        cut = metrics.get("unrecovered", metrics["compressed"])["texts"][label]["kl"]
        return f"{result['predicted']:.3f} → {cut:.3f}"

    return [
        "KL to the dense model that the division of the budget was predicted to leave, in nats per "
        f"token, before anything was cut → as measured on {label} (before recovery).",
        *grid(rows, cell),
        "",
    ]


def _whole(results: Results) -> list[str]:
    return [
        "The whole model: parameters (MB on disk, MB in memory after a forward on the CPU); "
        "indices of kept columns count as parameters, places of sparse entries do not, numbers of "
        "8 bits (mixed quantisation) as half a parameter; dense "
        f"{_sizes(results[0], 'dense')}.",
        *grid(results, lambda result: _sizes(result, "compressed")),
    ]


def _sizes(run: Mapping[str, Any], which: str) -> str:
    disk, memory = run["bytes"][which] / 1e6, run["memory"][which] / 1e6
    return f"{run['parameters'][which]:,} ({disk:,.2f}, {memory:,.2f})"


def _learned(results: Results) -> list[str]:
    """What trainings said of themselves, a line per run; nothing where nothing was trained."""
    rows = [
        f"| {run['method']} | {run['kept']:g} | "
        + ", ".join(f"{name} {value:.4g}" for name, value in run["learned"].items())
        + " |"
        for run in results
        if run.get("learned")
    ]
    return (
        ["", "What was learned.", "", "| method | kept | |", "|---|---|---|", *rows] if rows else []
    )


def _took(results: Results) -> list[str]:
    """What a sweep took; nothing where that is not on record."""
    spent = spent_of(results)
    if spent is None:
        return []
    together, cold = spent
    return [
        "",
        f"What it took: {together / HOUR:.2f} CPU hours, what several runs share counted once; "
        f"each of the {len(results)} runs by itself, with nothing cached, {cold / HOUR:.2f} CPU "
        "hours in all. CPU seconds of a run by itself:",
        *grid(results, lambda result: f"{result[SPENT]['alone']:,.0f}"),
    ]
