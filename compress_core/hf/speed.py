"""How fast models answer where they run, measured in turns, and what memory each takes by itself.

A prompt is one forward pass of all its tokens (prefill); every further token is one of a single
token behind it (decode), greedily. Tokens are random: what they are does not change the time.
"""

import inspect
import json
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from compress_core.errors import ModelError
from compress_core.forms.kinds import SLOTS, sizes_of, uncoded_shapes
from compress_core.forms.linear import is_compressed
from compress_core.hf.checkpoint import Checkpoint
from compress_core.hf.inside import read_json
from compress_core.hf.layout import load_config
from compress_core.hf.linear import is_linear
from compress_core.hf.loading import load_model

KINDS = ("prefill", "decode")
KILO = (1024, 1)  # the unit of getrusage's peak, on macOS bytes
CACHES = ("cache", "past_key_values", "cache_params")  # as versions of transformers call it


@dataclass(frozen=True)
class Load:
    """What is asked of a model at once.

    Attributes:
        batch: Prompts.
        prompt_tokens: In each.
        new_tokens: Written behind each, at least 2: the first comes with the prompt.
    """

    batch: int
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Speed:
    """One model under one load, repeats in order.

    Attributes:
        load: What was asked.
        prefill: Seconds until the first new token of all prompts is there, per repeat.
        decode: Seconds from there until the last one is, per repeat.
        peak_bytes: Memory that the model took at most; None where it was not measured.
    """

    load: Load
    prefill: tuple[float, ...]
    decode: tuple[float, ...]
    peak_bytes: int | None = None

    def metrics(self) -> dict[str, float]:
        """Of the median repeat; ``peak_bytes`` where it was measured."""
        prompt, new = self.load.prompt_tokens, self.load.new_tokens - 1
        first, rest = statistics.median(self.prefill), statistics.median(self.decode)
        found = {
            "prefill_tokens_per_second": self.load.batch * prompt / first,
            "decode_tokens_per_second": self.load.batch * new / rest,
            "first_token_seconds": first,
        }
        return found if self.peak_bytes is None else found | {"peak_bytes": float(self.peak_bytes)}

    def times(self, kind: str) -> tuple[float, ...]:
        """Seconds per repeat of "prefill" or "decode"."""
        return self.prefill if kind == "prefill" else self.decode

    def faster_than(self, other: "Speed", kind: str) -> float:
        """Median over turns of the other's time as a multiple of this one's in the same turn."""
        pairs = zip(other.times(kind), self.times(kind), strict=True)
        return statistics.median(theirs / own for theirs, own in pairs)

    def spread(self) -> dict[str, float]:
        """Largest distance of a repeat from the median one, as a part of it."""
        found = {}
        for name in KINDS:
            seconds = self.times(name)
            middle = statistics.median(seconds)
            found[name] = max(abs(s - middle) for s in seconds) / middle
        return found


def measure_speed(
    folder: Path,
    *,
    batch: int = 1,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    repeats: int = 3,
    device: str = "cpu",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    memory: bool = True,
) -> dict[str, float]:
    """One model's speed under one load.

    Args:
        folder: A model folder, dense or compressed.
        batch: Prompts at once.
        prompt_tokens: In each.
        new_tokens: Written behind each.
        repeats: Of which the median counts.
        device: Where it runs.
        dtype: In which, by torch's name; "auto" is the stored one.
        trust_remote_code: Whether the folder's own Python may run.
        memory: Whether its memory is measured, in a process of its own.

    Returns:
        ``prefill_tokens_per_second``, ``decode_tokens_per_second``, ``first_token_seconds`` and,
        with ``memory``, ``peak_bytes``.

    Raises:
        ModelError: The load is not one that the model takes, or it cannot be loaded.
    """
    load = Load(batch, prompt_tokens, new_tokens)
    check_load(folder, load)
    model = load_model(folder, device, dtype=dtype, trust_remote_code=trust_remote_code)
    ((speed,),) = in_turns({folder: model}, [load], repeats).values()
    found = speed.metrics()
    if memory:
        peak = peak_bytes(folder, load, device, dtype, trust_remote_code)
        found["peak_bytes"] = float(peak)
    return found


def check_load(folder: Path, load: Load) -> None:
    """Refuses a load that says nothing, or is longer than the model's context.

    Raises:
        ModelError: It is one.
    """
    if load.batch < 1 or load.prompt_tokens < 1 or load.new_tokens < 2:
        raise ModelError(
            "speed is measured with a batch of 1 or more, prompts of 1 or more tokens, and 2 or "
            f"more new ones; got {load.batch}, {load.prompt_tokens} and {load.new_tokens}"
        )
    settings = load_config(Checkpoint(folder, compressed=_compressed(folder)))
    context = getattr(settings.get_text_config(), "max_position_embeddings", None)
    wanted = load.prompt_tokens + load.new_tokens
    if context is not None and wanted > context:
        raise ModelError(
            f"{folder}: {load.prompt_tokens} + {load.new_tokens} tokens are more than the model's "
            f"context of {context}: ask for fewer"
        )


def in_turns(
    models: Mapping[Any, Any],
    loads: Sequence[Load],
    repeats: int,
    tell: Callable[[Load], None] = lambda load: None,
) -> dict[Any, list[Speed]]:
    """Speeds of models that take turns, so that all see the same machine; each warms up first.

    Args:
        models: By what they are called, all on one device.
        loads: What is asked of each.
        repeats: Of each load.
        tell: Told of a load before it is measured.

    Returns:
        By name, a speed per load.
    """
    found: dict[Any, list[Speed]] = {name: [] for name in models}
    for load in loads:
        tell(load)
        times: dict[Any, list[tuple[float, float]]] = {name: [] for name in models}
        for turn in range(repeats + 1):
            for name, model in models.items():
                took = _answer(model, load)
                if turn:
                    times[name].append(took)
        for name, taken in times.items():
            prefill, decode = zip(*taken, strict=True)
            found[name].append(Speed(load, prefill, decode))
    return found


@torch.inference_mode()
def _answer(model: Any, load: Load) -> tuple[float, float]:
    """Seconds of the prompt with the first new token, and of the others."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (load.batch, load.prompt_tokens), generator=draw)
    ids = ids.to(model.device)
    takes = inspect.signature(type(model).forward).parameters
    cache = next((name for name in CACHES if name in takes), CACHES[0])
    asked: dict[str, Any] = {"use_cache": True}
    if "logits_to_keep" in takes:  # of a prompt, as generation does
        asked["logits_to_keep"] = 1
    began = _now(ids)
    output = model(input_ids=ids, **asked)
    following = output.logits[:, -1:].argmax(-1)
    there = _now(ids)
    for _ in range(load.new_tokens - 1):
        asked[cache] = next((output[name] for name in CACHES if name in output), None)
        if asked[cache] is None:
            raise ModelError(f"{type(model).__name__} hands back no cache of earlier tokens")
        output = model(input_ids=following, **asked)
        following = output.logits[:, -1:].argmax(-1)
    return there - began, _now(ids) - there


def _now(tensor: torch.Tensor) -> float:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


def products_per_token(model: nn.Module) -> int:
    """Multiplications with weights for one token: every linear layer and the head.

    Embeddings are looked up, and what attention does with earlier tokens hangs on their number;
    neither is counted. Sparse entries count as one each, whether or not a kernel gains by them.
    """
    total = 0
    for module in model.modules():
        if is_compressed(module):
            sizes = sizes_of(module.out_features, module.in_features, module.entry)
            shapes = uncoded_shapes(module.entry, sizes)
            total += sum(math.prod(shapes[name]) for name in shapes if SLOTS[name].multiplied)
        elif is_linear(module):
            total += module.weight.numel()  # type: ignore[operator]
    return total


def _compressed(folder: Path) -> bool:
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"{folder} is no model folder: it has no config.json")
    return "quantization_config" in read_json(file)


def peak_bytes(
    folder: Path, load: Load, device: str, dtype: str, trust_remote_code: bool = False
) -> int:
    """Memory that a model takes at most under a load, measured in a process of its own.

    Of a CPU it is the growth of the process over what it held before the model was loaded; of a
    GPU what torch had allocated there.

    Raises:
        ModelError: The process did not end well; with its last line.
    """
    asked = {
        "folder": str(folder),
        "device": device,
        "dtype": dtype,
        "load": asdict(load),
        "trust_remote_code": trust_remote_code,
    }
    command = [sys.executable, "-m", "compress_core.hf.speed", json.dumps(asked)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        last = (ended.stderr.strip() or f"exit code {ended.returncode}").splitlines()[-1]
        raise ModelError(f"the memory of {folder} could not be measured: {last}")
    return int(ended.stdout.split()[-1])


def _measure_peak(asked: Mapping[str, Any]) -> int:
    cuda = torch.device(asked["device"]).type == "cuda"
    folder = Path(asked["folder"])
    with torch.device("meta"):  # brings in the code that the model is made of
        settings = load_config(Checkpoint(folder, compressed=_compressed(folder)))
        AutoModelForCausalLM.from_config(settings, trust_remote_code=asked["trust_remote_code"])
    before = 0 if cuda else _resident()
    model = load_model(
        folder,
        asked["device"],
        dtype=asked["dtype"],
        trust_remote_code=asked["trust_remote_code"],
    )
    _answer(model, Load(**asked["load"]))
    if cuda:
        return torch.cuda.max_memory_allocated(asked["device"])
    return _most_resident() - before


def _resident() -> int:
    """Bytes of this process's memory now, from which on Linux counts the peak anew."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _most_resident()


def _most_resident() -> int:
    """Bytes of this process's memory at most."""
    with suppress(OSError):  # not getrusage there: it has the peak of whoever started this
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if found:
            return int(found[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KILO[sys.platform == "darwin"]


if __name__ == "__main__":
    print(_measure_peak(json.loads(sys.argv[1])))
