"""Commands in processes of their own, counted by the system, on random Llamas of any shape."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import LlamaConfig, PreTrainedConfig

from tests.pipeline import pico

SMOLLM2 = pico.ROOT / "build" / "smollm2-135m"

# A child's maximum begins with what its parent has in memory; a parent that has just made a model
# has more than the child will take. So a process with nothing in it starts and counts the child.
BETWEEN = """
import json, os, subprocess, sys, time
begun = time.perf_counter()
with open("said.json", "w") as said:
    child = subprocess.Popen(sys.argv[1:], stdout=said)
_, status, usage = os.wait4(child.pid, 0)
print(json.dumps({
    "status": os.waitstatus_to_exitcode(status),
    "seconds": time.perf_counter() - begun,
    "cpu_seconds": usage.ru_utime + usage.ru_stime,
    "peak": usage.ru_maxrss * 1024,
}))
"""


@dataclass(frozen=True)
class Took:
    """What a command took.

    Attributes:
        seconds: From its start to its end.
        cpu_seconds: Of all its threads, and of the private Prefect server that it starts and ends.
        peak: Bytes that the process had in memory at most, by the system's own count.
        said: What it printed as JSON; None if nothing.
    """

    seconds: float
    cpu_seconds: float
    peak: int
    said: Any


def measured(words: Sequence[str], folder: Path) -> Took:
    """Runs words in a folder, one thread each for OpenMP, and counts what that took."""
    return counted(start(words, folder), folder)


def start(words: Sequence[str], folder: Path) -> subprocess.Popen[bytes]:
    """A process whose child runs words; it counts what that takes."""
    between = [sys.executable, "-I", "-S", "-c", BETWEEN, *words]
    environment = pico.clean_environment(PYTHONPATH=str(pico.ROOT))
    return subprocess.Popen(between, cwd=folder, env=environment, stdout=subprocess.PIPE)


def counted(started: subprocess.Popen[bytes], folder: Path, status: int = 0) -> Took:
    """Waits for what was started, which ends with ``status``, and says what it took."""
    found = json.loads(started.communicate()[0])
    assert found.pop("status") == status
    said = (folder / "said.json").read_text(encoding="utf-8")
    return Took(**found, said=json.loads(said) if said else None)


def command(name: str, settings: Mapping[str, Any], folder: Path) -> Took:
    """A command of ours with these settings; what it says is JSON."""
    return measured([*pico.arguments(name, settings), "--json"], folder)


def by_stage(result: Mapping[str, Any]) -> dict[str, float]:
    """Stage to the CPU seconds on record of its units, of a result; what is never kept has none."""
    found: dict[str, float] = {}
    for unit in result["stages"]:
        if unit["cpu_seconds"] is not None:
            found[unit["name"]] = found.get(unit["name"], 0.0) + unit["cpu_seconds"]
    return found


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """By which power of the size the values grow: least squares through their logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def llama(
    width: int,
    inner: int,
    blocks: int,
    *,
    heads: int = 4,
    groups: int = 2,
    vocabulary: int | None = None,
    own_head: bool = False,
    dtype: str = "float32",
) -> Callable[[int], PreTrainedConfig]:
    """Makes the configuration of a Llama from the size of its text's vocabulary.

    Args:
        width: Of its hidden states.
        inner: Of its MLPs.
        blocks: How many.
        heads: Of the queries.
        groups: Heads of keys and values.
        vocabulary: How many tokens; else the text's.
        own_head: Whether the head is not tied to the embedding.
        dtype: Of the weights.
    """

    def config(own: int) -> PreTrainedConfig:
        return LlamaConfig(
            vocab_size=vocabulary or own,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=blocks,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            max_position_embeddings=128,
            tie_word_embeddings=not own_head,
            dtype=dtype,
        )

    return config
