"""What `plan` prints: what a run or a sweep would compute, and why."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from compress_core.errors import ConfigError
from flows.report.console import Reporter
from flows.report.lines import duration, entry, make_console, say
from flows.runs.estimate import Estimate, estimate
from flows.runs.forecast import Planned, Planner
from flows.runs.foretold import FISHER_MISSES, PRESS_MISSES, SEEN, Foretold, foretold
from flows.runs.opened import open_command
from flows.runs.prediction import WITHOUT_ROUNDING
from flows.runs.workspace import LIBRARIES
from flows.settings.config import DEFAULT_METHOD, RunConfig, Settings, SweepConfig, build_config
from flows.settings.reading import file_and_flags

Print = Callable[[Any], None]
UNITS = 27  # where a plan's lines go on
LARGEST_TOLD = 1000  # times the dense model's perplexity: beyond it a prediction says nothing
# Held to what is on record by tests/contracts/test_results.py.
TOO_LOW = (
    f"of second order: in docs/results KL above {SEEN:g} came to {PRESS_MISSES[0]:g} to "
    f"{PRESS_MISSES[1]:g} times that of press, to {FISHER_MISSES[0]:g} to {FISHER_MISSES[1]:g} "
    "times that of ranks by fisher"
)


def plan_as_run_or_sweep(
    given: dict[str, Any], file: Path | None, as_json: bool, print_json: Print
) -> None:
    """Plans the run or the sweep that the same flags would start.

    Raises:
        ConfigError: As `run` and `sweep` would.
    """
    settings = as_run_or_sweep(file_and_flags(given, file))
    opened = open_command(settings, Reporter(quiet=True), planning=True)
    workspace = opened.workspace
    planner = Planner(workspace.store, opened.settings.refresh)
    runs = [planner.groups(pipeline) for pipeline in opened.pipelines]
    planned = [unit for run in runs for units in run.values() for unit in units]
    expected = estimate(runs, workspace)
    methods = {pipeline.config.label: pipeline for pipeline in opened.pipelines}  # at any budget
    curves = {label: foretold(planner, pipeline) for label, pipeline in methods.items()}
    if as_json:
        found = {"units": [asdict(unit) for unit in planned], "estimate": asdict(expected)}
        found["notes"] = list(workspace.notes)
        curve = {label: [asdict(point) for point in points] for label, points in curves.items()}
        print_json({**found, "predicted": {label: own for label, own in curve.items() if own}})
    else:
        _print(planned, expected, workspace.notes, opened.settings.cluster is not None)
        _print_curves(curves)


def as_run_or_sweep(values: dict[str, Any]) -> Settings:
    """A run where one method and one budget are given, else a sweep.

    Raises:
        ConfigError: A setting is wrong, or cannot be planned.
    """
    if "method" in values and "methods" in values:
        raise ConfigError("give --method for a run or --methods for a sweep, not both")
    if values.get("target_perplexity") is not None:
        raise ConfigError(
            "what a --target-perplexity leads to is known only after evaluating: plan a --kept"
        )
    kept = values.pop("kept", None)
    kepts = kept if isinstance(kept, list) else [] if kept is None else [kept]
    swept = bool(values.get("methods")) or len(kepts) > 1
    if values.get("target_bytes") is not None and (kepts or swept):
        raise ConfigError("--target-bytes is the budget of one run: no --kept, one method")
    kind: type[Settings] = SweepConfig if swept else RunConfig
    # A file that a run of the other kind wrote holds settings of that kind, without values.
    values = {n: v for n, v in values.items() if v is not None or n in kind.model_fields}
    if swept:
        methods = values.pop("methods", None) or [values.pop("method", DEFAULT_METHOD)]
        return build_config(SweepConfig, {**values, "methods": methods, "kept": kepts}, None)
    values.pop("methods", None)
    return build_config(RunConfig, values | ({"kept": kepts[0]} if kepts else {}), None)


def _print(
    planned: list[Planned], expected: Estimate, notes: list[str], cluster: bool = False
) -> None:
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
    entry(console, "time", _time(expected, cluster))
    for what in expected.not_counted:
        entry(console, "", f"not counted: {what}")
    entry(console, "memory", _memory(expected))
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


def _time(expected: Estimate, cluster: bool) -> str:
    """How long it takes, and what that supposes."""
    computes = f"the model runs in {expected.computes_in}"
    if expected.workers == 1:
        idle = "if the machine does nothing else"
        return f"about {duration(expected.seconds)}, {idle} ({computes})"
    idle = "if its machines are like this one and do" if cluster else "if the machine does"
    return (
        f"about {duration(expected.seconds)} with {expected.workers} processes, their start aside "
        f"({duration(expected.alone)} in one), {idle} nothing else ({computes})"
    )


def _memory(expected: Estimate) -> str:
    """What one process needs, all that share its memory need, and there is."""
    each = "" if expected.workers == 1 else " a process"
    stage = f" ({expected.largest.stage})" if expected.largest else ""
    told = f"{expected.memory / 1e6:,.0f} MB at most{each} beyond the libraries{stage}, "
    if expected.together > expected.memory + LIBRARIES:
        told += f"{expected.together / 1e6:,.0f} MB of all at once with those, "
    told += f"{expected.free_memory / 1e6:,.0f} MB free"
    if expected.allowed_memory is None:
        return told
    return f"{told}, {expected.allowed_memory / 1e6:,.0f} MB allowed{each} in all"


def _print_curves(curves: Mapping[str, Sequence[Foretold]]) -> None:
    """What other budgets would cost, where tables in the store say it."""
    console = make_console()
    for label, curve in curves.items():
        for point in curve:
            words = f"{label} kept {point.kept:.3f}, {point.bytes / 1e6:,.1f} MB"
            entry(console, "predicted", f"{words}: {_foreseen(point)}")
    if any(curves.values()):
        entry(console, "", TOO_LOW)


def _foreseen(point: Foretold) -> str:
    """A KL and what it makes of a perplexity, were the text what the dense model expects."""
    told = f"KL {point.divergence:.3g} nats per token"
    if not point.rounding:
        return f"{told}; {WITHOUT_ROUNDING}"
    if point.divergence > math.log(LARGEST_TOLD):
        return told
    return f"{told}, perplexity {math.exp(point.divergence):.3g} times the dense one's"
