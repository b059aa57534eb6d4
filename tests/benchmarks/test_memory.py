"""Peak memory, evaluation included: of a run by the depth of its model, of a sweep by its runs."""

from pathlib import Path

import pytest

from tests.benchmarks.commands import command, llama
from tests.benchmarks.conftest import Bench
from tests.pipeline import pico

DEPTHS = (12, 48)
WIDTH = 256
RUNS = (2, 20)
PEAKS: dict[int, int] = {}
SWEEPS: dict[int, int] = {}


@pytest.mark.parametrize("depth", DEPTHS)
def test_peak_memory(depth: int, bench: Bench, tmp_path: Path) -> None:
    """The peak, and how much of it the further blocks are, beside what they would take."""
    inputs = pico.make_inputs(tmp_path, config=llama(WIDTH, 2 * WIDTH, depth))
    size = (inputs.model / "model.safetensors").stat().st_size
    PEAKS[depth] = command("run", inputs.settings(tmp_path / "home", samples=8), tmp_path).peak
    first = PEAKS.get(DEPTHS[0], PEAKS[depth])
    assert PEAKS[depth] <= 1.1 * first
    bench.row(
        benchmark=f"memory of a run, {depth} blocks, model {size / 2**20:.0f} MiB",
        mebibytes=f"{PEAKS[depth] / 2**20:.0f}",
        of_the_shallowest=f"{PEAKS[depth] / first:.2f}",
    )


@pytest.mark.parametrize("runs", RUNS)
def test_peak_memory_of_a_sweep(runs: int, bench: Bench, tmp_path: Path) -> None:
    """What a process has in memory at most, however many runs it makes."""
    inputs = pico.make_inputs(tmp_path, config=llama(WIDTH, 2 * WIDTH, 4))
    kept = [round(0.3 + 0.02 * number, 2) for number in range(runs)]
    settings = inputs.settings(tmp_path / "home", methods=["svd_llm"], kept=kept, samples=8)
    SWEEPS[runs] = command("sweep", settings, tmp_path).peak
    first = SWEEPS.get(RUNS[0], SWEEPS[runs])
    assert SWEEPS[runs] <= 1.1 * first
    bench.row(
        benchmark=f"memory of a sweep of {runs} runs",
        mebibytes=f"{SWEEPS[runs] / 2**20:.0f}",
        of_the_shortest=f"{SWEEPS[runs] / first:.2f}",
    )
