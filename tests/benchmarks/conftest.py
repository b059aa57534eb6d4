"""Benchmarks report multiples of things timed in one run; nothing here asserts a time."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter

import pytest

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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the report and keeps it as JSON."""
    if not ROWS:
        return
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(ROWS, indent=1) + "\n")
    terminalreporter.section("benchmarks")
    for row in ROWS:
        terminalreporter.write_line("  ".join(f"{name}: {value}" for name, value in row.items()))
