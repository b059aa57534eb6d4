"""Peak memory of a whole run, evaluation included, against the depth of the model."""

import os
import subprocess
from pathlib import Path

import pytest
from transformers import LlamaConfig, PreTrainedConfig

from tests.benchmarks.conftest import Bench
from tests.pipeline import pico

DEPTHS = (12, 48)
WIDTH = 256
PEAKS: dict[int, int] = {}


def peak_of_run(inputs: pico.Inputs, folder: Path) -> int:
    """Bytes that a run had in memory at most; Prefect's server is another process."""
    settings = inputs.settings(folder / "home", samples=8)
    words = pico.arguments("run", settings)
    environment = pico.clean_environment(PYTHONPATH=str(pico.ROOT))
    started = subprocess.Popen(words, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(started.pid, 0)
    started.returncode = status
    assert status == 0
    return usage.ru_maxrss * 1024


@pytest.mark.parametrize("depth", DEPTHS)
def test_peak_memory(depth: int, bench: Bench, tmp_path: Path) -> None:
    """The peak, and how much of it the further blocks are, beside what they would take."""

    def config(vocabulary: int) -> PreTrainedConfig:
        return LlamaConfig(
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=depth,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=vocabulary,
            max_position_embeddings=64,
            tie_word_embeddings=True,
        )

    inputs = pico.make_inputs(tmp_path, config=config)
    size = (inputs.model / "model.safetensors").stat().st_size
    PEAKS[depth] = peak_of_run(inputs, tmp_path)
    first = PEAKS.get(DEPTHS[0], PEAKS[depth])
    assert PEAKS[depth] <= 1.1 * first
    bench.row(
        benchmark=f"memory of a run, {depth} blocks, model {size / 2**20:.0f} MiB",
        mebibytes=f"{PEAKS[depth] / 2**20:.0f}",
        of_the_shallowest=f"{PEAKS[depth] / first:.2f}",
    )
