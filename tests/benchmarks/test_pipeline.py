"""A whole run of svd_llm, evaluation included, against the depth and the width of the model."""

from pathlib import Path

import pytest

from tests.benchmarks.commands import by_stage, command, exponent, llama, size_of
from tests.benchmarks.conftest import Bench
from tests.pipeline import pico

DEPTHS, WIDTH = (2, 4, 8, 16, 32), 256
WIDTHS, BLOCKS = (512, 1024, 2048, 4096), 1
WINDOWS, LENGTH = 8, 64
Figures = dict[str, float]


def figures(folder: Path, width: int, blocks: int) -> Figures:
    """CPU seconds of every stage and in all, peak and store in MiB, of one run from nothing."""
    heads = width // 64
    shape = llama(width, width * 43 // 16, blocks, heads=heads, groups=heads)
    inputs = pico.make_inputs(folder, config=shape)
    home = folder / "home"
    settings = inputs.settings(home, samples=WINDOWS, length=LENGTH, eval_windows=WINDOWS)
    took = command("run", settings, folder)
    stages = by_stage(took.said)
    on_record = sum(stages.values())
    return {
        **stages,
        "on_record": on_record,
        "not_kept": took.cpu_seconds - on_record,
        "in_all": took.cpu_seconds,
        "peak_mib": took.peak / 2**20,
        "store_mib": size_of(home / "store") / 2**20,
    }


@pytest.mark.parametrize("along", ["depth", "width"])
def test_pipeline(along: str, bench: Bench, tmp_path: Path) -> None:
    """Figures of every size, then the powers of the size by which they grow.

    In small models much is what does not grow, so the powers are of the upper half of the sizes.
    """
    sizes = DEPTHS if along == "depth" else WIDTHS
    found: list[Figures] = []
    for size in sizes:
        shape = (WIDTH, size) if along == "depth" else (size, BLOCKS)
        found.append(figures(tmp_path / str(size), *shape))
        cells = {name: f"{value:.2f}" for name, value in found[-1].items()}
        bench.row(benchmark=f"pipeline against {along}, {size}", **cells)
    upper = len(sizes) // 2
    powers = {
        name: exponent(sizes[upper:], [each[name] for each in found[upper:]]) for name in found[0]
    }
    bench.row(
        benchmark=f"pipeline against {along}, exponents of {sizes[upper]} to {sizes[-1]}",
        **{name: f"{power:.2f}" for name, power in powers.items()},
    )
