"""Peak memory of collecting and decomposing against the depth of the model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.benchmarks.conftest import Bench

DEPTHS = (4, 8, 16)
PEAKS: dict[int, dict[str, float]] = {}

# Streams a model block by block and decomposes every layer, as the stages do, in a fresh process.
PROGRAM = """
import json, sys, threading, time
from pathlib import Path
import psutil
import torch
from compress_core.hf.checkpoint import Checkpoint
from compress_core.hf.layout import inspect_model
from compress_core.hf.stream import BlockStream
from compress_core.decompose import ProjectOutputs
from compress_core.metric import OutputError
checkpoint = Checkpoint(Path(sys.argv[1]))
layout = inspect_model(checkpoint)
def resident():  # less the file pages that safetensors maps, which the system can take back
    memory = psutil.Process().memory_info()
    return (memory.rss - memory.shared) / 2**20
before = peak = resident()
def watch():
    global peak
    while True:
        peak = max(peak, resident())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
stream = BlockStream(checkpoint, layout)
hidden = stream.embed(torch.randint(0, 256, (8, 128)), 4)
for block in range(len(layout.blocks)):
    taps = layout.taps(block)
    stats = stream.run_block(block, hidden, 4, taps=list(taps))
    for tap, layers in taps.items():
        metric = OutputError().metric(stats[tap])
        for layer in layers:
            weight = checkpoint.read(layer.name + ".weight")
            ProjectOutputs().prepare(weight, metric, layer.paying_rank)
print(json.dumps({"before": before, "peak": peak}))
"""


@pytest.mark.parametrize("depth", DEPTHS)
def test_peak_memory(depth: int, bench: Bench, tmp_path: Path) -> None:
    """MiB above the imports, and the model's own size, for the same width at three depths."""
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=depth,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=256,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    size = sum(p.numel() for p in model.parameters()) * 4 / 2**20
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=True
    )
    PEAKS[depth] = json.loads(done.stdout)
    above = PEAKS[depth]["peak"] - PEAKS[depth]["before"]
    first = PEAKS[DEPTHS[0]]["peak"] - PEAKS[DEPTHS[0]]["before"] if DEPTHS[0] in PEAKS else above
    bench.row(
        benchmark=f"memory, {depth} blocks, model {size:.0f} MiB",
        mebibytes_above_imports=f"{above:.0f}",
        of_the_shallowest=f"{above / first:.2f}",
    )
