"""A run beside whose 300 units there is nothing to do, and the plan of a model without weights."""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

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
SHAPE = llama(
    8192, 28672, 80, heads=64, groups=8, vocabulary=32000, own_head=True, dtype="bfloat16"
)
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


def test_plan_of_a_shape(bench: Bench, tmp_path: Path) -> None:
    """The plan of 70 billion weights that are nowhere: of a config.json; then it again.

    The first measures what the machine does in a second, too.
    """
    inputs = pico.make_inputs(tmp_path)
    (inputs.model / "model.safetensors").unlink()
    config = SHAPE(0)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(inputs.model)
    with torch.device("meta"):
        assert AutoModelForCausalLM.from_config(config).num_parameters() == PARAMETERS
    settings = inputs.settings(tmp_path / "home", kept=0.8)
    for time in ("first", "again"):
        took = command("plan", settings, tmp_path)
        found = took.said["estimate"]
        bench.row(
            benchmark=f"plan of {PARAMETERS / 1e9:.0f}B weights that are nowhere, {time}",
            took=told(took),
            peak=f"{took.peak / 2**20:.0f} MiB",
            units=str(len(took.said["units"])),
            planned=f"{found['seconds'] / 3600:.0f} h, {found['memory'] / 1e9:.0f} GB of memory, "
            f"{found['disk'] / 1e9:.0f} GB of disk, model of {found['models'][0] / 1e9:.0f} GB",
        )
