"""Run as a script: every stage on the simulated device, then with a mistake planted in each.

The device is there for the rest of a process, so that it has one of its own. Prints what became of
it as JSON.
"""

import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

from compress_core.errors import ModelError
from tests.pipeline import pico

WAYS: dict[str, dict[str, Any]] = {
    "hull": {
        "method": "svd_llm@hull:probe_windows=2",
        "recover": "blocks+factors",
        "recover_steps": 2,
    },
    "press": {"method": "press", "kept": 0.3},
    "gradients": {"method": "fwsvd"},
    "soco": {"method": "soco:phase1=2:phase2=1:phase3=1"},
    "cap": {"method": "cap:reading=printed:iterations=3:policy=group:steps=2"},
    "columns": {"method": "duo_svd@uniform"},
    "shared": {"method": "basis_sharing:group=2"},
    "pruned": {"method": "slim:mask=sparsegpt", "bits": 4, "kept": 0.25},
}
"""Runs that reach every stage, and the code that differs between devices most."""

MISTAKES: dict[str, tuple[str, str, str, str]] = {
    "activations": ("hull", "collect", "compress_core/hf/stream.py", "batch.to(self.device)"),
    "gradients of outputs": (
        *("press", "collect", "compress_core/hf/output_gradients.py"),
        "window[None].to(device)",
    ),
    "gradients of weights": ("gradients", "collect", "compress_core/hf/fisher.py", "window[None]"),
    "a metric": ("hull", "decompose", "compress_core/metric.py", "self.h.to(device)"),
    "a probed weight": ("hull", "probe", "compress_core/hf/probe.py", "windows.to(device)"),
    "a curve's weight": ("press", "predict", "tasks/stages/predict.py", "dense_weight_of"),
    "a compressed prefix": ("press", "measure", "compress_core/hf/prefix.py", "stored.to("),
    "a fit": ("press", "realise", "compress_core/layer/make.py", "self.device, torch.float64"),
    "the teacher": ("soco", "teacher", "compress_core/learn/teacher.py", "batch.to(device)"),
    "a training": ("soco", "learn", "compress_core/learn/loop.py", "training.windows[windows]"),
    "a block's targets": ("hull", "recover", "compress_core/recover/blocks.py", "self.targets"),
    "recovery": ("hull", "recover", "compress_core/recover/loss.py", "self.windows[picks]"),
    "evaluation": ("hull", "evaluate", "compress_core/evaluate.py", "windows[start"),
}
"""What stays on the CPU: a run, a stage that is computed again, and words of a line in a file."""


def main(folder: Path) -> None:
    """Runs all of it below a folder."""
    from tests import simulated_device  # here alone: whoever imports it has the device from then on

    inputs = pico.make_inputs(folder / "inputs", config=partial(pico.llama, blocks=2))

    def walk(way: str, **more: Any) -> pico.Walk:
        return pico.walk(inputs.settings(folder / "home", device="sim", **{**WAYS[way], **more}))

    ran = {way: walk(way) for way in WAYS}
    stages = sorted({stage for found in ran.values() for stage, _ in found.keys})
    found = {}
    for name, (way, stage, file, words) in MISTAKES.items():
        simulated_device.forgetful = file, words
        try:
            walk(way, refresh=[stage])
            found[name] = "nothing"
        except (simulated_device.Elsewhere, ModelError) as error:  # some say it of the model
            found[name] = " ".join([str(error), *getattr(error, "__notes__", [])])
        finally:
            simulated_device.forgetful = None
    finite = {way: math.isfinite(walk.metrics()["kl"]) for way, walk in ran.items()}
    print(json.dumps({"ran": finite, "stages": stages, "found": found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
