"""The whole pipeline on a model of LLaMA-7B's shape: two of its blocks on a CPU, all on a GPU."""

from pathlib import Path

import pytest
import torch

from tests.benchmarks.commands import by_stage, command, llama, size_of
from tests.benchmarks.conftest import Bench
from tests.pipeline import pico

WIDTH, INNER, HEADS, VOCABULARY = 4096, 11008, 32, 32000
WINDOWS, LENGTH = 4, 128


@pytest.mark.parametrize(
    ("blocks", "device"),
    [
        pytest.param(2, "cpu", id="blocks_2"),
        pytest.param(32, "cuda", id="blocks_32", marks=pytest.mark.gpu),
    ],
)
def test_seven_billion(blocks: int, device: str, bench: Bench, tmp_path: Path) -> None:
    """`svd_llm` at 0.8, bfloat16, random weights; 32 blocks take some 100 GB of disk."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("32 blocks need a CUDA device; 2 blocks run on a CPU")
    shape = llama(
        WIDTH,
        INNER,
        blocks,
        heads=HEADS,
        groups=HEADS,
        vocabulary=VOCABULARY,
        own_head=True,
        dtype="bfloat16",
    )
    inputs = pico.make_inputs(tmp_path, config=shape)
    home = tmp_path / "home"
    settings = inputs.settings(
        home, kept=0.8, samples=WINDOWS, length=LENGTH, eval_windows=WINDOWS, device=device
    )
    took = command("run", settings, tmp_path)
    stages = by_stage(took.said)
    bench.row(
        benchmark=f"LLaMA-7B's shape, {blocks} blocks on {device}, {WINDOWS} windows of {LENGTH}",
        **{stage: f"{seconds:.1f} CPU s" for stage, seconds in stages.items()},
        not_kept=f"{took.cpu_seconds - sum(stages.values()):.1f} CPU s",
        in_all=f"{took.cpu_seconds:.0f} CPU s, {took.seconds:.0f} s",
        peak=f"{took.peak / 2**20:.0f} MiB",
        model=f"{took.said['bytes']['dense'] / 2**20:.0f} MiB",
        compressed=f"{took.said['bytes']['compressed'] / 2**20:.0f} MiB",
        store=f"{size_of(home / 'store') / 2**20:.0f} MiB",
    )
