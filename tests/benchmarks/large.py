"""A model of 3 billion random weights, compressed and evaluated in 8 GB, and once killed between.

    python -m tests.benchmarks.large FOLDER [METHOD]

makes the model in FOLDER (6.4 GB), runs it, kills the run when its first layers are decomposed,
runs the same command again, and prints what every stage took as JSON. Two hours of CPU time.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedConfig

from tests.pipeline import pico

MEMORY = "8GB"
KILLED_AFTER = 3  # decompositions
SECONDS = 4 * 3600.0  # that are waited for the first of them


def config(vocabulary: int) -> PreTrainedConfig:
    """The shape of Llama 3.2 3B; the text's own tokens are some of the vocabulary's."""
    del vocabulary
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )


def make_model(folder: Path) -> pico.Inputs:
    """The model and its texts, made once."""
    made = pico.Inputs(folder / "pico", folder / "calibration.txt", folder / "evaluation.txt")
    if not (made.model / "model.safetensors.index.json").is_file():
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            pico.make_inputs(folder, config=config)
        finally:
            torch.set_default_dtype(before)
    return made


def run(words: list[str], folder: Path, kill_at: Path | None = None) -> dict[str, Any]:
    """One run in a process of its own: the system's count of its seconds and memory.

    Args:
        words: The command.
        folder: Where it runs.
        kill_at: A folder of artifacts; kill -9 once there are ``KILLED_AFTER`` in it.
    """
    environment = pico.clean_environment(PYTHONPATH=str(pico.ROOT))
    begun = time.monotonic()
    started = subprocess.Popen(words, cwd=folder, env=environment, stdout=subprocess.PIPE)
    if kill_at is not None:
        while len(list(kill_at.glob("*/*/manifest.json"))) < KILLED_AFTER:
            if started.poll() is not None or time.monotonic() - begun > SECONDS:
                raise SystemExit("the run ended before it could be killed")
            time.sleep(1)
        started.send_signal(signal.SIGKILL)
    assert started.stdout is not None
    said = started.stdout.read()
    _, status, usage = os.wait4(started.pid, 0)
    started.returncode = os.waitstatus_to_exitcode(status)
    figures = {
        "peak_rss_gb": round(usage.ru_maxrss * 1024 / 1e9, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime),
        "seconds": round(time.monotonic() - begun),
        "status": started.returncode,
    }
    return figures | ({"result": json.loads(said)} if said and kill_at is None else {})


def main(folder: Path, method: str = "svd_llm") -> None:
    """Makes the model, runs, kills, runs again, and prints what it took."""
    inputs = make_model(folder)
    settings = inputs.settings(
        folder / "home", method=method, kept=0.8, samples=4, length=128, eval_windows=4
    )
    settings["memory"] = MEMORY
    words = [*pico.arguments("run", settings), "--json"]
    killed = run(words, folder, folder / "home" / "store" / "decompose")
    resumed = run(words, folder)
    print(json.dumps({"memory": MEMORY, "killed": killed, "resumed": resumed}, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), *sys.argv[2:])
