"""Four methods at four budgets in one sweep of SmolLM2, against sixteen runs from nothing."""

from pathlib import Path

import pytest

from flows.report.spent import spent_of, with_spent
from tests.benchmarks.commands import SMOLLM2, by_stage, command
from tests.benchmarks.conftest import Bench
from tests.pipeline import pico

METHODS = ["svd", "asvd", "svd_llm", "svd_llm_v2"]
KEPT = [0.9, 0.8, 0.6, 0.4]
CHECKED = ("svd_llm", 0.6)
# As many calibration windows to one of evaluation as the defaults have.
WINDOWS = {"samples": 16, "length": 512, "eval_windows": 4}


def test_sweep_against_cold_runs(shared: Path, bench: Bench, tmp_path: Path) -> None:
    """CPU seconds; of the cold runs by what is on record of their units, one of them measured.

    What no run keeps (the start, the registration) is measured on that one and counted for all.
    """
    if not SMOLLM2.is_dir():
        pytest.skip(f"needs {SMOLLM2}: make build/smollm2-135m")
    data = shared / "data"
    inputs = pico.Inputs(SMOLLM2, data / "wiki2015/valid.jsonl", data / "wikitext2/test.txt")
    homes = [tmp_path / "sweep", tmp_path / "cold"]
    asked = inputs.settings(homes[0], methods=METHODS, kept=KEPT, **WINDOWS)
    sweep = command("sweep", asked, tmp_path)
    method, kept = CHECKED
    cold = command("run", inputs.settings(homes[1], method=method, kept=kept, **WINDOWS), tmp_path)
    results = with_spent(sweep.said)
    spent, of_cold = spent_of(results), sum(by_stage(cold.said).values())
    assert spent is not None
    shared_once, alone = spent
    not_kept = cold.cpu_seconds - of_cold
    for result in results:
        bench.row(
            benchmark=f"sweep, {result['method']} kept {result['kept']}",
            alone=f"{result['cpu_seconds']['alone']:.1f}",
            added=f"{result['cpu_seconds']['added']:.1f}",
            **{f"{name}_alone": f"{part:.1f}" for name, part in by_stage(result).items()},
        )
    same = next(r for r in results if (r["method"], r["kept"]) == CHECKED)
    bench.row(
        benchmark=f"{method} kept {kept} from nothing, measured",
        cpu_seconds=f"{cold.cpu_seconds:.1f}",
        on_record=f"{of_cold:.1f}",
        on_record_in_the_sweep=f"{same['cpu_seconds']['alone']:.1f}",
        not_kept=f"{not_kept:.1f}",
    )
    runs = len(results)
    bench.row(
        benchmark=f"{runs} runs in one sweep against {runs} from nothing",
        sweep=f"{sweep.cpu_seconds:.0f} CPU s, {sweep.seconds:.0f} s",
        units_of_the_sweep=f"{shared_once:.0f} CPU s",
        cold_runs=f"{alone + runs * not_kept:.0f} CPU s",
        units_of_cold_runs=f"{alone:.0f} CPU s",
        cheaper=f"{(alone + runs * not_kept) / sweep.cpu_seconds:.2f}",
        cheaper_units_alone=f"{alone / shared_once:.2f}",
    )
