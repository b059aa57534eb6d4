"""What orchestration adds to a unit: Prefect's task, the key, the store's look-up and commit."""

from pathlib import Path
from time import perf_counter

import numpy as np

from flows.report.console import Reporter
from flows.server import runtime
from storage.store import Store
from tasks.engine.session import Session
from tasks.engine.units import Unit
from tasks.engine.work import Group, Work
from tests.benchmarks.conftest import Bench

BLOCKS, UNITS = 24, 7


def groups() -> list[Group]:
    """As many units as a 24-block Llama has layers, each of three tiny arrays."""

    def compute(work: Work) -> None:
        for unit in work.missing:
            with work.draft(unit) as draft:
                for name in ("ut", "v", "loss"):
                    draft.put(name, np.zeros((4, 4)))

    return [
        Group(
            "decompose",
            f"block {block}",
            [
                Unit(
                    "decompose",
                    f"layer {block}.{index}",
                    settings={"block": block, "index": index},
                    code=["compress_core.decompose.ProjectOutputs"],
                )
                for index in range(UNITS)
            ],
            compute,
        )
        for block in range(BLOCKS)
    ]


def test_overhead_per_unit(bench: Bench, tmp_path: Path) -> None:
    """Milliseconds per unit when everything is computed, and when everything is cached."""
    runtime.prepare_environment(tmp_path / "home")
    runtime.start_early()
    from prefect import flow

    from flows.runs.hands import Here
    from flows.runs.run import run_groups

    store = Store(tmp_path / "store")

    @flow(name="overhead", persist_result=False)
    def overhead() -> None:
        session = Session(store)
        run_groups(groups(), session, Reporter(quiet=True), Here(session))

    with runtime.flow_settings():
        for label in ("computed", "cached"):
            started = perf_counter()
            overhead()
            spent = perf_counter() - started
            bench.row(
                benchmark=f"orchestration, {BLOCKS * UNITS} units {label}",
                milliseconds_per_unit=f"{1000 * spent / (BLOCKS * UNITS):.1f}",
            )
    runtime.stop()
