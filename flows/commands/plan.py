"""What `plan` and `methods` print."""

import inspect
from collections.abc import Callable
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from compress_core.allocate import ALLOCATORS, allocator_options, build_allocator
from compress_core.errors import ConfigError
from compress_core.methods import METHODS, build_method
from flows.report.lines import duration, entry, make_console, say
from flows.runs.budget import resolve_budget
from flows.runs.forecast import Estimate, Planned, Planner, estimate
from flows.runs.pipeline import build_pipeline
from flows.runs.workspace import open_workspace
from flows.settings.checks import check_methods
from flows.settings.config import RunConfig, Settings, SweepConfig, build_config, file_and_flags
from flows.settings.home import open_home

Print = Callable[[Any], None]
NAMES = 14  # width of the names in the list of methods
UNITS = 27  # where a plan's lines go on


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
        print_json({"units": [asdict(unit) for unit in planned], "estimate": asdict(expected)})
    else:
        _print(planned, expected, workspace.notes)


def _print(planned: list[Planned], expected: Estimate, notes: list[str]) -> None:
    console = make_console()
    for note in notes:
        entry(console, "note", note)
    for (stage, state, why), members in groupby(planned, lambda u: (u.stage, u.state, u.why)):
        units = list(members)
        name = units[0].unit if len(units) == 1 else f"{units[0].unit} … {units[-1].unit}"
        word = {"cached": "cached", "run": "to run", "waits": "to run"}[state]
        reason = f"  ({why})" if why else ""
        entry(console, stage, f"{word:<6} {len(units):>4}  {name}{reason}", UNITS)
    todo = sum(unit.state != "cached" for unit in planned)
    say(console, f"{todo} of {len(planned)} units to run")
    if not todo:
        return
    entry(
        console,
        "time",
        f"about {duration(expected.seconds)}, if the machine does nothing else "
        f"(models compute in {expected.computes_in})",
    )
    for what in expected.not_counted:
        entry(console, "", f"not counted: {what}")
    entry(
        console,
        "memory",
        f"{expected.memory / 1e6:,.0f} MB at most beyond the libraries, "
        f"{expected.free_memory / 1e6:,.0f} MB free",
    )
    entry(
        console,
        "disk",
        f"{expected.disk / 1e6:,.1f} MB in the data directory, "
        f"{expected.free_disk / 1e6:,.0f} MB free",
    )
    sizes = " to ".join(
        f"{size / 1e6:,.1f}" for size in sorted({*expected.models[:1], *expected.models[-1:]})
    )
    entry(console, "model", f"{sizes} MB on disk")
    for shortage in expected.shortages:
        entry(console, "note", shortage)


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
    console = make_console()
    heading = "--allocate"
    for row in rows:
        if row["kind"] == "allocator" and heading:
            say(console, "")
            say(console, heading)
            heading = ""
        paper = f" (arXiv {row['paper']})" if row.get("paper") else ""
        say(console, f"{row['name']:<{NAMES}} {row['summary']}{paper}", NAMES + 1)
        given = ", ".join(f"{name}={value}" for name, value in row["options"].items())
        if given:
            say(console, f"{'':<{NAMES}} {given}", NAMES + 1)
