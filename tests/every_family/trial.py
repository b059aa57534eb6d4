"""One family tried from end to end: stream against whole model, folder against replaced weights."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from compress_core.errors import ModelError
from compress_core.forms.linear import is_compressed
from compress_core.hf.checkpoint import Checkpoint
from compress_core.hf.layout import inspect_model
from compress_core.hf.model_code import first_line
from compress_core.hf.stream import BlockStream
from tasks.engine.dense_model import FOLDER
from tests.every_family.small import small_model
from tests.families import VOCABULARY, token_batch
from tests.pipeline import pico

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

    A refusal is a `ModelError`; whatever else is raised is a fault of ours.
    """
    try:
        model = small_model(model_type)
        model.save_pretrained(folder / "dense")
        whole = AutoModelForCausalLM.from_pretrained(folder / "dense").eval()
        expected = _logits(whole)
    except Exception as error:
        return Outcome("not built", first_line(error))
    try:
        _require("what was saved loads with the same", expected, _logits(model))
        _try_built(folder, whole, expected)
    except ModelError as error:
        return Outcome("refused", str(error).replace(str(folder), "FOLDER"))
    except Exception as error:
        return Outcome("fault", f"{type(error).__name__}: {first_line(error)}")
    return Outcome("accepted")


def _try_built(folder: Path, whole: Any, expected: Tensor) -> None:
    checkpoint = Checkpoint(folder / "dense")
    _stream_equals(whole, BlockStream(checkpoint, inspect_model(checkpoint)))
    small = _compressed(folder)
    load = AutoModelForCausalLM.from_pretrained
    stock, by_own_code = load(small).eval(), load(small, trust_remote_code=True).eval()
    names = [name for name, module in stock.named_modules() if is_compressed(module)]
    if not names:
        raise Wrong(f"no layer of the loaded {type(stock).__name__} is factored")
    for name in names:
        module = stock.get_submodule(name)
        if not is_compressed(by_own_code.get_submodule(name)):
            raise Wrong(f"{name} is dense where the model is loaded by its own code")
        weight = module.dense_weight().detach()
        stored = nn.Parameter(weight.T if module.transposed else weight)
        whole.get_submodule(name).weight = stored
    found, again = _logits(stock), _logits(by_own_code)
    _require("both ways of loading give the same", again, found)
    _require("the folder is the model with its weights replaced, by", _logits(whole), found, 1e-3)
    if torch.equal(found, expected):
        raise Wrong("the compressed model is the dense one")


def _compressed(folder: Path) -> Path:
    """The folder that a run of `svd_llm` makes."""
    text = folder / "words.txt"
    text.write_text(pico.made_text(seed=1, words=2000), encoding="utf-8")
    _tokenizer(text).save_pretrained(folder / "dense")
    settings = {"model": str(folder / "dense"), "calibration": str(text), "kept": 0.6}
    settings["method"] = "svd_llm"
    sizes = {"samples": 4, "length": 32, "batch_size": 3, "eval_windows": 2}
    walk = pico.walk({**settings, **sizes, "device": "cpu", "home": folder / "home"})
    if not math.isfinite(walk.metrics()["kl"]):
        raise Wrong("the measured divergence is not finite")
    return walk.session.artifact(walk.pipeline.folder).file(FOLDER)


def _tokenizer(text: Path) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.train([str(text)], trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@torch.no_grad()
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


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return found


def _require(what: str, found: Tensor, expected: Tensor, tolerance: float = 0.0) -> None:
    if not torch.isfinite(expected).all():
        raise Wrong(f"{what} numbers: they are not finite")
    if found.shape != expected.shape:
        raise Wrong(f"{what} numbers: {tuple(found.shape)}, not {tuple(expected.shape)}")
    gap = float((found - expected).abs().max() / expected.abs().max())
    if gap > tolerance:
        raise Wrong(f"{what} numbers: they differ by {gap:.1g}")
