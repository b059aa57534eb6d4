"""A run beside whose 300 units there is nothing to do, and the plan of a model without numbers."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from tests.benchmarks.commands import Took, command, llama, measured
from tests.benchmarks.conftest import Bench
from tests.pipeline import pico

BLOCKS = 13  # with svd_llm 23 units each, and 6 besides
ROUNDS = 3
START = """
import gc, sys
from pathlib import Path
from flows.commands.cli import start_runtime
start_runtime(Path(sys.argv[1]))
gc.disable()
import flows.commands.execute, flows.runs.execute
import mlflow.pyfunc, mlflow.store.tracking.sqlalchemy_store
gc.freeze(); gc.enable()
from flows.runs.run import in_flow
from flows.server import runtime
with runtime.flow_settings():
    in_flow("nothing", "nothing", None, lambda: None)
"""
SHAPE = llama(8192, 28672, 80, heads=64, groups=8, vocabulary=32000, dtype="bfloat16")
PARAMETERS = 68_976_648_192  # of Llama 2 70B


def told(took: Took) -> str:
    """Its CPU seconds and seconds."""
    return f"{took.cpu_seconds:.2f} CPU s, {took.seconds:.2f} s"


def test_a_run_with_nothing_to_do(bench: Bench, tmp_path: Path) -> None:
    """Beside what starting the libraries, Prefect and an empty flow takes; the best of each."""
    inputs = pico.make_inputs(tmp_path, config=llama(32, 56, BLOCKS))
    settings = inputs.settings(tmp_path / "home")
    units = command("run", settings, tmp_path).said["stages"][:-1]
    start = [sys.executable, "-c", START, str(tmp_path / "home")]
    empty, again = [], []
    for _ in range(ROUNDS):
        empty.append(measured(start, tmp_path))
        again.append(command("run", settings, tmp_path))
        assert {unit["state"] for unit in again[-1].said["stages"][:-1]} == {"cached"}
    least, run = (min(each, key=lambda took: took.cpu_seconds) for each in (empty, again))
    bench.row(
        benchmark=f"a run again, {len(units)} units cached",
        run=told(run),
        start_alone=told(least),
        beyond_it=f"{run.cpu_seconds - least.cpu_seconds:.2f} CPU s, "
        f"{run.seconds - least.seconds:.2f} s",
    )


def test_plan_of_holes(bench: Bench, tmp_path: Path) -> None:
    """The plan of 70 billion weights whose files are headers and holes; then it again.

    The first digests 138 GB of zeros that lie on no disk, the second remembers their digests.
    """
    inputs = pico.make_inputs(tmp_path)
    kept = write_holes(inputs.model, SHAPE(0))
    settings = inputs.settings(tmp_path / "home", kept=0.8)
    for time in ("first", "again"):
        took = command("plan", settings, tmp_path)
        found = took.said["estimate"]
        bench.row(
            benchmark=f"plan of {PARAMETERS / 1e9:.0f}B weights that are holes, {time}",
            took=told(took),
            peak=f"{took.peak / 2**20:.0f} MiB",
            on_disk=f"{kept / 2**20:.1f} MiB",
            units=str(len(took.said["units"])),
            planned=f"{found['seconds'] / 3600:.0f} h, {found['memory'] / 1e9:.0f} GB of memory, "
            f"{found['disk'] / 1e9:.0f} GB of disk, model of {found['models'][0] / 1e9:.0f} GB",
        )


def write_holes(folder: Path, config: PreTrainedConfig) -> int:
    """Puts a shape in place of a folder's model: a file per block, of headers and tensors' names.

    Returns:
        Bytes that its weight files take on the disk.
    """
    (folder / "model.safetensors").unlink()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        tensors = AutoModelForCausalLM.from_config(config).state_dict()
    assert sum(tensor.numel() for tensor in tensors.values()) == PARAMETERS
    place = {
        name: f"model-{name.split('.')[2] if '.layers.' in name else 'outer'}.safetensors"
        for name in tensors
    }
    for file in set(place.values()):
        header: dict[str, Any] = {}
        end = 0
        for name, tensor in tensors.items():
            if place[name] == file:
                size = 2 * math.prod(tensor.shape)
                ends = [end, end + size]
                header[name] = {"dtype": "BF16", "shape": [*tensor.shape], "data_offsets": ends}
                end += size
        said = json.dumps(header).encode()
        with (folder / file).open("wb") as handle:
            handle.write(len(said).to_bytes(8, "little") + said)
            handle.truncate(8 + len(said) + end)
            for name, entry in header.items():  # layers with the same weights would be one unit
                handle.seek(8 + len(said) + entry["data_offsets"][0])
                handle.write(name.encode())
    index = {"metadata": {}, "weight_map": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(file.stat().st_blocks * 512 for file in folder.glob("model-*"))
