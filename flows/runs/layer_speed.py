"""Up to which rank factors are faster than the dense weight: of this machine, or from a file.

`METHOD@ALLOCATOR:device=here` measures every shape of the model once and keeps it in the data
directory, as a file that can be copied to another machine and named there: `device=FILE`. What it
says is part of the allocation's key, by content.
"""

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from compress_core.allocate.stepped import Shape, Stepped
from compress_core.errors import ConfigError
from compress_core.method import Method
from flows.runs.machine import best
from flows.runs.workspace import Workspace
from storage.records import NoRecordError, read_record, write_record

HERE = "here"
FOLDER = "speed"  # in the data directory
FORMAT = 1
TOKENS = (1, 256)  # at once, of one step of decoding and of a prompt: factors have to win at both
EIGHTHS = 8  # ranks that are tried: eighths of the largest that is smaller than the dense weight
LEAST = 2e-3  # seconds of one timing
MARGIN = 0.98  # of the dense weight's time: what is gained by less is not measured reliably


def on_device(method: Method, workspace: Workspace) -> Method:
    """The method, its allocator told what is fast on the device that it names.

    Raises:
        ConfigError: It names a file that does not say that.
    """
    allocator = method.allocate
    if not isinstance(allocator, Stepped) or not allocator.device:
        return method
    model = workspace.model
    shapes = {(layer.out_features, layer.in_features) for layer in model.layout.layers}
    if allocator.device == HERE:
        home = workspace.settings.home.expanduser()
        found = _measured_here(home, shapes, model.device, model.compute_dtype)
    else:
        found = _read_file(Path(allocator.device).expanduser(), shapes)
    return replace(method, allocate=allocator.on({shape: found[shape] for shape in shapes}))


def _measured_here(home: Path, shapes: set[Shape], device: str, dtype: str) -> dict[Shape, int]:
    """From the data directory; what is not there yet is measured and added."""
    kind = torch.device(device).type
    said = torch.cuda.get_device_name(device) if kind == "cuda" else torch.get_num_threads()
    name = f"{kind}-{said}-{dtype}-torch-{torch.__version__}"
    file = home / FOLDER / f"{re.sub(r'[^A-Za-z0-9.-]+', '-', name)}.json"
    known = _shapes_of(file) if file.exists() else {}
    missing = shapes - known.keys()
    if missing:
        known |= {shape: fastest_rank(shape, device, dtype) for shape in sorted(missing)}
        rows = [{"out": out, "in": into, "rank": known[out, into]} for out, into in sorted(known)]
        fields = {"format": FORMAT, "device": name, "tokens": list(TOKENS), "shapes": rows}
        write_record(file, fields, indent=1)
    return known


def _read_file(file: Path, shapes: Iterable[Shape]) -> dict[Shape, int]:
    if not file.is_file():
        raise ConfigError(
            f"option device={file}: there is no such file; `device={HERE}` measures this machine, "
            f"and keeps a file per machine in {FOLDER}/ of the data directory"
        )
    known = _shapes_of(file)
    for out, into in sorted(shapes):
        if (out, into) not in known:
            raise ConfigError(
                f"{file} says nothing of layers of {into} inputs and {out} outputs: measure the "
                f"model on that machine with `device={HERE}`"
            )
    return known


def _shapes_of(file: Path) -> dict[Shape, int]:
    try:
        rows: Any = read_record(file, unsealed=True).get("shapes")
        found = {(row["out"], row["in"]): row["rank"] for row in rows}
        if not all(type(n) is int and n >= 0 for key, r in found.items() for n in (*key, r)):
            raise NoRecordError("a number of it is none")
    except (NoRecordError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{file} is no table of layers' speed ({error}): it has a list `shapes` of `out`, `in` "
            "and `rank`, the largest rank that is faster than the dense weight"
        ) from None
    return found


def fastest_rank(shape: Shape, device: str, dtype: str) -> int:
    """The largest rank tried up to which factors are faster than the dense weight; 0 for none.

    Args:
        shape: Out and in.
        device: Where.
        dtype: In which the products are computed, by torch's name.
    """
    out, into = shape
    paying = (out * into - 1) // (out + into)
    ranks = sorted({paying * part // EIGHTHS for part in range(1, EIGHTHS + 1)} - {0})

    def weight(*size: int) -> torch.Tensor:
        return torch.full(size, 0.01, device=device, dtype=getattr(torch, dtype))

    dense = {tokens: _seconds([weight(out, into)], tokens, into) for tokens in TOKENS}
    fastest = 0
    for rank in ranks:
        factors = [weight(rank, into), weight(out, rank)]
        if any(_seconds(factors, n, into) > MARGIN * dense[n] for n in TOKENS):
            break
        fastest = rank
    return fastest


@torch.inference_mode()
def _seconds(weights: list[torch.Tensor], tokens: int, width: int) -> float:
    """Of one pass of tokens (tokens, width) through the weights, one after another."""
    inputs = torch.ones(tokens, width, device=weights[0].device, dtype=weights[0].dtype)

    def passes(times: int) -> float:
        for _ in range(times):
            hidden = inputs
            for weight in weights:
                hidden = F.linear(hidden, weight)
        return float(hidden[0, 0])  # waits for the device

    threads = torch.get_num_threads() if inputs.device.type == "cpu" else 0
    times = max(1, int(LEAST / best(lambda: passes(1), threads, 2)))
    return best(lambda: passes(times), threads) / times
