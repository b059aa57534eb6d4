"""Benchmarks report multiples of things timed in one run, or CPU seconds; none asserts a time."""

import json
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter

import pytest
import torch

Row = dict[str, str]
ROWS: list[Row] = []
RESULTS = Path(__file__).resolve().parents[2] / ".benchmarks" / "results.json"


class Bench:
    """Collects rows and times alternatives in turn."""

    def row(self, **cells: str) -> None:
        """One line of the report."""
        ROWS.append(cells)

    def seconds(self, *candidates: Callable[[], object], rounds: int = 5) -> list[float]:
        """The best time of each candidate, the candidates taking turns so that noise is shared."""
        best = [float("inf")] * len(candidates)
        for _ in range(rounds):
            for index, candidate in enumerate(candidates):
                started = perf_counter()
                candidate()
                best[index] = min(best[index], perf_counter() - started)
        return best


@pytest.fixture
def bench() -> Iterator[Bench]:
    """What a benchmark reports to."""
    yield Bench()


def machine() -> str:
    """Where this was measured: processor, cores, torch."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    name = next(names, platform.processor() or platform.machine())
    return f"{os.cpu_count()} cores of {name}, torch {torch.__version__}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the report and keeps it as JSON, beside what other benchmarks left there."""
    if not ROWS:
        return
    here = machine()
    RESULTS.parent.mkdir(exist_ok=True)
    kept = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    rows = {row["benchmark"]: row for row in [*kept, *(row | {"machine": here} for row in ROWS)]}
    RESULTS.write_text(json.dumps(list(rows.values()), indent=1) + "\n")
    terminalreporter.section("benchmarks")
    terminalreporter.write_line(here)
    for row in ROWS:
        terminalreporter.write_line("  ".join(f"{name}: {value}" for name, value in row.items()))
