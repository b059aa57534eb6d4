"""What `plan` and `methods` print."""

import inspect
from collections.abc import Callable
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table

from compress_core.allocate import ALLOCATORS, allocator_options, build_allocator
from compress_core.errors import ConfigError
from compress_core.methods import METHODS, build_method
from flows.report.console import make_console
from flows.runs.budget import resolve_budget
from flows.runs.forecast import Estimate, Planned, Planner, estimate
from flows.runs.pipeline import build_pipeline
from flows.runs.workspace import open_workspace
from flows.settings.checks import check_methods
from flows.settings.config import RunConfig, Settings, SweepConfig, build_config, file_and_flags
from flows.settings.home import open_home

Print = Callable[[Any], None]


def plan_as_run_or_sweep(
    given: dict[str, Any], file: Path | None, as_json: bool, print_json: Print
) -> None:
    """Plans the run or the sweep that the same flags would start.

    Raises:
        ConfigError: As `run` and `sweep` would.
    """
    values = file_and_flags(given, file)
    if "method" in values and "methods" in values:
        raise ConfigError("give --method for a run or --methods for a sweep, not both")
    values.pop("output", None)
    if values.get("target_perplexity") is not None:
        raise ConfigError(
            "what a --target-perplexity leads to is known only after evaluating: plan a --kept"
        )
    target = {"target_bytes": values.pop("target_bytes", None)}
    values.setdefault("methods", [values.pop("method", "svd_llm")])
    if isinstance(values.get("kept"), int | float):
        values["kept"] = [values["kept"]]
    if target["target_bytes"] is not None:
        if "kept" in values or len(values["methods"]) > 1:
            raise ConfigError("--target-bytes is the budget of one run: no --kept, one method")
        common = {name: value for name, value in values.items() if name != "methods"}
        run = build_config(RunConfig, common | target | {"method": values["methods"][0]}, None)
        settings: Settings = run
        runs = [run]
    else:
        settings = sweep = build_config(SweepConfig, values, None)
        runs = sweep.runs()
    open_home(settings.home.expanduser())
    kepts = [run.kept for run in runs if run.kept is not None]
    check_methods(settings, list(dict.fromkeys(run.method for run in runs)), kepts)
    workspace = open_workspace(settings)
    planner = Planner(workspace.store, settings.refresh)
    planned = [
        unit
        for run in runs
        for unit in planner.plan(build_pipeline(workspace, resolve_budget(workspace, run)))
    ]
    expected = estimate(planned, workspace)
    if as_json:
        print_json(
            {
                "units": [asdict(unit) for unit in planned],
                "estimate": asdict(expected),
                "compute": workspace.model.compute_dtype,
            }
        )
    else:
        _print(planned, expected, workspace.notes, workspace.model.compute_dtype)


def _print(planned: list[Planned], expected: Estimate, notes: list[str], compute: str) -> None:
    console = make_console()
    console.print(f"compute      {compute}", markup=False)
    for note in notes:
        console.print(f"note         {note}", markup=False)
    for (stage, state, why), members in groupby(planned, lambda u: (u.stage, u.state, u.why)):
        units = list(members)
        name = units[0].unit if len(units) == 1 else f"{units[0].unit} … {units[-1].unit}"
        word = {"cached": "cached", "run": "to run", "waits": "to run"}[state]
        reason = f"  ({why})" if why else ""
        console.print(f"{stage:<12} {word:<8} {len(units):>4}  {name}{reason}", markup=False)
    todo = sum(unit.state != "cached" for unit in planned)
    console.print(f"{todo} of {len(planned)} units to run", markup=False)
    if todo:
        console.print(
            f"about {expected.seconds:.0f} s, {expected.memory / 1e6:,.0f} MB of memory beyond the "
            f"libraries, {expected.disk / 1e6:,.1f} MB of disk",
            markup=False,
        )


def list_methods(as_json: bool, print_json: Print) -> None:
    """A line per method and per allocator: what it is, its paper, options and their defaults."""
    rows: list[dict[str, Any]] = []
    for name, factory in METHODS.items():
        method = build_method(name)
        parameters = inspect.signature(factory).parameters
        rows.append(
            {
                "kind": "method",
                "name": name,
                "summary": method.summary,
                "paper": method.paper,
                "options": {option: p.default for option, p in parameters.items()},
                "needs_calibration": method.needs_calibration,
            }
        )
    for name, kind in ALLOCATORS.items():
        options = allocator_options(name)
        rows.append(
            {
                "kind": "allocator",
                "name": name,
                "summary": (kind.__doc__ or "").partition("\n")[0].rstrip("."),
                "options": {option: getattr(build_allocator(name), option) for option in options},
            }
        )
    if as_json:
        print_json(rows)
        return
    table = Table(box=None, pad_edge=False)
    for column in ("name", "what it does", "paper", "options"):
        table.add_column(column)
    for row in rows:
        if row["kind"] == "allocator" and row["name"] == next(iter(ALLOCATORS)):
            table.add_row("")
            table.add_row("--allocate")
        given = ", ".join(f"{name}={value}" for name, value in row["options"].items())
        paper = f"arXiv {row['paper']}" if row.get("paper") else ""
        table.add_row(row["name"], row["summary"], paper, given)
    make_console().print(table)
