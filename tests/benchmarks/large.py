"""A model of 3 billion random weights, compressed and evaluated in 8 GB, and once killed between.

    python -m tests.benchmarks.large FOLDER [METHOD]

makes the model in FOLDER (6.4 GB), runs it, kills the run when its first layers are decomposed,
runs the same command again, and prints what every stage took as JSON. Two hours of CPU time.
"""

import json
import signal
import sys
import time
from pathlib import Path

import psutil
import torch

from tests.benchmarks.commands import Took, by_stage, counted, llama, measured, start
from tests.pipeline import pico

MEMORY = "8GB"
KILLED_AFTER = 3  # decompositions
SECONDS = 4 * 3600.0  # that are waited for the first of them


# Llama 3.2 3B's; the text's own tokens are some of the vocabulary's
SHAPE = llama(3072, 8192, 28, heads=24, groups=8, vocabulary=128256, dtype="bfloat16")


def make_model(folder: Path) -> pico.Inputs:
    """The model and its texts, made once."""
    made = pico.Inputs(folder / "pico", folder / "calibration.txt", folder / "evaluation.txt")
    if not (made.model / "model.safetensors").is_file():
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            pico.make_inputs(folder, config=SHAPE)
        finally:
            torch.set_default_dtype(before)
    return made


def killed(words: list[str], folder: Path, layers: Path) -> Took:
    """A run that is killed as soon as some layers are decomposed.

    Args:
        words: The command.
        folder: Where it runs.
        layers: Where their artifacts come to lie.
    """
    started, deadline = start(words, folder), time.monotonic() + SECONDS
    while len(list(layers.glob("*/*/manifest.json"))) < KILLED_AFTER:
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(1)
    (command,) = psutil.Process(started.pid).children()
    command.kill()
    return counted(started, folder, -signal.SIGKILL)


def main(folder: Path, method: str = "svd_llm") -> None:
    """Makes the model, runs, kills, runs again, and prints what it took."""
    inputs = make_model(folder)
    settings = inputs.settings(
        folder / "home", method=method, kept=0.8, samples=4, length=128, eval_windows=4
    )
    settings["memory"] = MEMORY
    words = [*pico.arguments("run", settings), "--json"]
    first = killed(words, folder, folder / "home" / "store" / "decompose")
    second = measured(words, folder)
    print(json.dumps({"memory": MEMORY, "killed": figures(first), "resumed": figures(second)}))
    print(json.dumps(by_stage(second.said)))


def figures(took: Took) -> dict[str, float]:
    """Peak memory and seconds of a process."""
    return {
        "peak_gb": round(took.peak / 1e9, 2),
        "cpu_seconds": round(took.cpu_seconds),
        "seconds": round(took.seconds),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), *sys.argv[2:])
