"""One family tried from end to end: stream against whole model, folder against replaced weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import compress_core.hf.quantizer  # noqa: F401  registers the compressed format
from compress_core.errors import CompressError
from compress_core.head import Halves
from compress_core.hf.checkpoint import Checkpoint
from compress_core.hf.factored import is_factored
from compress_core.hf.folder import FactoredWeights, write_folder
from compress_core.hf.layout import inspect_model
from compress_core.hf.stream import BlockStream
from compress_core.types import ModelLayout
from tests.every_family.small import small_model
from tests.families import token_batch

State = Literal["accepted", "refused", "not built", "fault"]
TOKENS = token_batch(rows=3, length=12)
BATCH = 2


@dataclass(frozen=True)
class Outcome:
    """What became of a family, and why in one sentence where it was not accepted."""

    state: State
    why: str = ""


class Wrong(AssertionError):
    """A result that differs from what it has to be."""


def try_family(model_type: str, folder: Path) -> Outcome:
    """Builds a small model of the type in a new ``folder`` and compresses it.

    A refusal is a `CompressError`; whatever else is raised is a fault of ours.
    """
    try:
        model = small_model(model_type)
        model.save_pretrained(folder / "dense")
        whole = AutoModelForCausalLM.from_pretrained(folder / "dense").eval()
        with torch.no_grad():
            expected = whole(input_ids=TOKENS, use_cache=False).logits
    except Exception as error:
        return Outcome("not built", _line(error))
    try:
        _require("what was saved loads with the same", *_logits(model, expected))
        _try_built(folder, whole, expected)
    except CompressError as error:
        return Outcome("refused", str(error).replace(str(folder), "FOLDER"))
    except Exception as error:
        return Outcome("fault", f"{type(error).__name__}: {_line(error)}")
    return Outcome("accepted")


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__


@torch.no_grad()
def _try_built(folder: Path, whole: Any, expected: Tensor) -> None:
    checkpoint = Checkpoint(folder / "dense")
    layout = inspect_model(checkpoint)
    _stream_equals(whole, BlockStream(checkpoint, layout))
    halves = Halves(whole)
    hidden = halves.hidden(TOKENS)
    found = torch.stack([halves.logits(rows) for rows in hidden])
    _require("logits made of the last hidden states are the", found, expected, 1e-5)
    layers = list(_cut(whole, checkpoint, layout))
    write_folder(
        folder / "small",
        checkpoint,
        layers,
        architecture=layout.architecture,
        base_class=layout.base_class,
        base_prefix=layout.base_prefix,
    )
    load = AutoModelForCausalLM.from_pretrained
    stock = load(folder / "small").eval()
    by_own_code = load(folder / "small", trust_remote_code=True).eval()
    for name in (layer.name for layer in layers):
        for model in (stock, by_own_code):
            if not is_factored(model.get_submodule(name)):
                raise Wrong(f"{name} is not factored in the loaded {type(model).__name__}")
    found, again = _logits(stock, _logits(by_own_code)[0])
    _require("both ways of loading give the same", found, again)
    _require("the folder is the model with its weights replaced, by", *_logits(whole, found), 1e-3)
    if torch.equal(found, expected):
        raise Wrong("the compressed model is the dense one")


def _stream_equals(whole: Any, stream: BlockStream) -> None:
    """Every hidden state that the stream computes is the whole model's, to the bit."""
    outputs: list[list[Tensor]] = [[] for _ in stream.layout.blocks]

    def keep(seen: list[Tensor]) -> Any:
        def hook(_: Any, __: Any, output: Any) -> None:
            seen.append((output[0] if isinstance(output, tuple | list) else output).clone())

        return hook

    handles = [
        whole.get_submodule(path).register_forward_hook(keep(seen))
        for path, seen in zip(stream.layout.blocks, outputs, strict=True)
    ]
    for batch in TOKENS.split(BATCH):
        whole(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    hidden = stream.embed(TOKENS, BATCH)
    for block, seen in enumerate(outputs):
        taps = stream.layout.taps(block)
        measured = stream.run_block(block, hidden, BATCH, taps=list(taps))
        _require(f"block {block} gives the same", hidden, torch.cat(seen))
        if measured.keys() != taps.keys():
            raise Wrong(f"block {block}: not every tap was measured")


def _cut(whole: Any, checkpoint: Checkpoint, layout: ModelLayout) -> Iterator[FactoredWeights]:
    """Half of the components of every layer; the whole model gets what they stand for."""
    for layer in layout.layers:
        if not (rank := layer.paying_rank // 2):
            continue
        held = whole.get_submodule(layer.name).weight
        weight = held.T if layer.transposed else held
        left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
        u, v = (left[:, :rank] * values[:rank]).float(), right[:rank].float()
        held.copy_((u @ v).T if layer.transposed else u @ v)
        key = checkpoint.key(f"{layer.name}.weight", layout.base_prefix)
        yield FactoredWeights(layer.name, key, u, v)


def _logits(model: Any, other: Tensor | None = None) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        found: Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return found, found if other is None else other


def _require(what: str, found: Tensor, expected: Tensor, tolerance: float = 0.0) -> None:
    if not torch.isfinite(expected).all():
        raise Wrong(f"{what} numbers: they are not finite")
    if found.shape != expected.shape:
        raise Wrong(f"{what} numbers: {tuple(found.shape)}, not {tuple(expected.shape)}")
    gap = float((found - expected).abs().max() / expected.abs().max())
    if gap > tolerance:
        raise Wrong(f"{what} numbers: they differ by {gap:.1g}")
