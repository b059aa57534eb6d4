"""Peak memory of a whole run, evaluation included, against the depth of the model."""

from pathlib import Path

import pytest

from tests.benchmarks.commands import command, llama
from tests.benchmarks.conftest import Bench
from tests.pipeline import pico

DEPTHS = (12, 48)
WIDTH = 256
PEAKS: dict[int, int] = {}


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
