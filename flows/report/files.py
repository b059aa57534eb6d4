"""A sweep as files that can go into documentation: JSON, a Markdown table, a picture."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress_core.errors import ConfigError
from flows.report.series import baseline, sweep_series, training_series
from flows.report.spent import cost_lines, with_spent
from flows.report.tables import entries_part
from tasks.stages.materialise import cannot_write
from tasks.tracking.plots import plot_sweep, plot_training

PAGE = "report.html"


def write_report(folder: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Writes ``results.json``, ``table.md`` and pictures.

    ``perplexity.png`` where it was measured at several budgets, ``training.png`` where trainings
    changed the stored share.

    Args:
        folder: Made if absent; its files of these names are replaced.
        results: What the sweep returned.

    Raises:
        StoreFullError, StorePermissionError: The folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder, results)
    except OSError as error:
        raise cannot_write(folder, error) from error


def check_report(folder: Path, flag: str = "--report") -> None:
    """Refuses a report's folder before the work it would report on.

    Args:
        folder: The folder.
        flag: What names it.

    Raises:
        ConfigError: There is a file in the way, or no permission to write.
    """
    above = next(place for place in (folder, *folder.parents) if place.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(f"{flag} {folder} cannot be written: {above} is in the way")


def _write(folder: Path, given: Sequence[Mapping[str, Any]]) -> None:
    results = with_spent(given)
    lines = ",\n".join(json.dumps(portable(run), ensure_ascii=False) for run in results)
    (folder / "results.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    (folder / "table.md").write_text(markdown_table(results), encoding="utf-8")
    draw_sweep(results, folder / "perplexity.png")
    if trained := training_series(results):
        plot_training(trained, folder / "training.png")


def draw_sweep(results: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draws perplexity against size, where there is a line to draw: at two budgets or more.

    Args:
        results: Of a sweep, or what its ``results.json`` says of them.
        file: PNG to write.
    """
    measured = [run for run in results if "perplexity" in run["metrics"]["compressed"]]
    if len({run["kept"] for run in measured}) > 1:
        chosen = sweep_series(measured)
        rest = len({run["method"] for run in measured}) - len(chosen)
        plot_sweep(measured, {row: baseline(row) for row in chosen}, rest, file)


def markdown_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Methods in rows, budgets in columns: a table per text, and one of sizes."""
    budgets = sorted({result["kept"] for result in results}, reverse=True)
    methods = list(dict.fromkeys(result["method"] for result in results))
    cell = {(result["method"], result["kept"]): result for result in results}
    first = results[0]
    lines = []
    entries = (
        " Of what stores components and entries: entries' part of the layers' numbers."
        if any("entries" in result for result in results)
        else ""
    )
    for label, dense in first["metrics"]["dense"]["texts"].items():
        lines += [
            f"{first['model']} on {label}: perplexity (KL to the dense model, nats per token), "
            f"{dense['windows']} windows of {dense['length']} tokens, seed {first['seed']}; "
            f"dense {dense['perplexity']:.4g}.{entries}",
            "",
            "| method | " + " | ".join(f"kept {kept:g}" for kept in budgets) + " |",
            "|---|" + "---|" * len(budgets),
        ]
        for method in methods:
            cells = [_measured(cell[method, kept], label) for kept in budgets]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += [
        "The whole model: parameters (MB on disk, MB in memory after a forward on the CPU); "
        "indices of kept columns count as parameters, places of sparse entries do not, numbers of "
        "8 bits (mixed quantisation) as half a parameter; dense "
        f"{_sizes(first, 'dense')}.",
        "",
        "| method | " + " | ".join(f"kept {kept:g}" for kept in budgets) + " |",
        "|---|" + "---|" * len(budgets),
    ]
    for method in methods:
        runs = [cell[method, kept] for kept in budgets]
        sizes = [_sizes(run, "compressed") for run in runs]
        lines.append(f"| {method} | " + " | ".join(sizes) + " |")
    lines += _learned(results)
    lines += cost_lines(results)
    return "\n".join(lines) + "\n"


def _measured(result: Mapping[str, Any], label: str) -> str:
    """Perplexity and KL on a text; with what a recovery began with before it."""
    metrics, part = result["metrics"], entries_part(result)
    text = metrics["compressed"]["texts"][label]
    found = f"{text['perplexity']:.4g} ({text['kl']:.3f}{f'; {part} % entries' if part else ''})"
    if "unrecovered" in metrics:
        found = f"{metrics['unrecovered']['texts'][label]['perplexity']:.4g} → {found}"
    return found


def _learned(results: Sequence[Mapping[str, Any]]) -> list[str]:
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


def _sizes(run: Mapping[str, Any], which: str) -> str:
    disk, memory = run["bytes"][which] / 1e6, run["memory"][which] / 1e6
    return f"{run['parameters'][which]:,} ({disk:,.2f}, {memory:,.2f})"


def portable(result: Mapping[str, Any]) -> dict[str, Any]:
    """The result without what is true of one machine or one moment only."""
    local = ("curves", "model_dir", "stages", "seconds", "registered", "run_id")
    return {name: value for name, value in result.items() if name not in local}
