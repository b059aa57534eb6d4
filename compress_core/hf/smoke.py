"""A smoke test of generation: does a model write on, with finite logits and without looping?"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress_core.errors import ModelError
from compress_core.finite import all_finite
from compress_core.hf.loading import load_model
from compress_core.hf.refusing import refusing
from compress_core.hf.text import clip_length, load_tokenizer
from compress_core.hf.writing import continuation

RUN = 4  # tokens in a run whose repetition is counted, as seq-rep-4


@dataclass(frozen=True)
class Smoke:
    """What a model wrote after one prompt, the likeliest token each time.

    Attributes:
        prompt: What it was given.
        text: What it wrote.
        finite: Whether all logits were finite; it wrote on up to the first that were not.
        repetition: Share of its runs of four tokens that were there before (seq-rep-4 of Welleck
            et al. 2019, "Neural Text Generation with Unlikelihood Training"); 0 of fewer than two.
    """

    prompt: str
    text: str
    finite: bool
    repetition: float

    @property
    def empty(self) -> bool:
        """Whether nothing can be read in it."""
        return not self.text.strip()


def smoke_test(
    folder: Path,
    prompts: Sequence[str],
    *,
    new_tokens: int = 64,
    device: str = "cpu",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> list[Smoke]:
    """What the model in a folder writes after each prompt.

    Args:
        folder: Dense or compressed model folder with its tokenizer.
        prompts: What it is given, one at a time.
        new_tokens: At most so many are generated after each.
        device: Where it runs.
        dtype: In which it runs; "auto" is the one it is stored in.
        trust_remote_code: Whether the folder's own Python may run.

    Raises:
        ModelError: The model does not load, or a prompt leaves no room in its context.
    """
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    with refusing(ModelError, f"the model in {folder} does not load"):
        model = load_model(folder, device, trust_remote_code=trust_remote_code, dtype=dtype)
    return [_write_on(model, tokenizer, prompt, new_tokens) for prompt in prompts]


def _write_on(model: Any, tokenizer: Any, prompt: str, new_tokens: int) -> Smoke:
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    room = clip_length(ids.shape[1] + new_tokens, model.config) - ids.shape[1]
    if not ids.numel() or room < 1:
        raise ModelError(f"the prompt {prompt!r} has {ids.shape[1]} tokens: nothing can follow it")
    ids = ids.to(model.device)
    finite = True

    def watch(_module: Any, _inputs: Any, output: Any) -> None:
        nonlocal finite
        finite = finite and all_finite(output.logits)

    handle = model.register_forward_hook(watch)
    try:
        stop = [lambda _ids, _scores, **_more: not finite]
        new, text = continuation(model, tokenizer, ids, room, stopping_criteria=stop)
    finally:
        handle.remove()
    return Smoke(prompt, text, finite, repetition(new))


def repetition(tokens: Sequence[int], run: int = RUN) -> float:
    """Share of runs of tokens that were there before: 0 where none was, towards 1 in a loop."""
    runs = [tuple(tokens[at : at + run]) for at in range(len(tokens) - run + 1)]
    return 0.0 if len(runs) < 2 else 1 - len(set(runs)) / len(runs)
