"""A sweep as files that can go into documentation: JSON, a Markdown table, a picture."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress_core.errors import ConfigError
from flows.report.markdown import markdown_table
from flows.report.series import baseline, sweep_series, training_series
from flows.report.spent import SPENT, with_spent
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
    lines = ",\n".join(json.dumps(_saved(run), ensure_ascii=False) for run in results)
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


def _saved(result: Mapping[str, Any]) -> dict[str, Any]:
    return portable(result) | {name: result[name] for name in (SPENT,) if name in result}


def portable(result: Mapping[str, Any]) -> dict[str, Any]:
    """The result without what is true of one machine or one moment only."""
    local = ("curves", "model_dir", "stages", "seconds", "registered", "run_id", SPENT)
    return {name: value for name, value in result.items() if name not in local}
