"""A model's own words: the likeliest continuation of a prompt."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from compress_core.hf.loading import load_model
from compress_core.hf.text import load_tokenizer


def write_on(folder: Path, prompt: str, tokens: int) -> str:
    """What the model in a folder writes after a prompt; as :func:`write_all`."""
    return write_all(folder, [prompt], tokens)[0]


def write_all(
    folder: Path,
    prompts: Sequence[str],
    tokens: int,
    *,
    trust_remote_code: bool = False,
    dtype: str = "auto",
) -> list[str]:
    """What the model in a folder writes after each prompt, the likeliest token each time.

    Args:
        folder: Dense or compressed model folder with its tokenizer.
        prompts: Not part of what is returned.
        tokens: How many to write; fewer where the text ends before.
        trust_remote_code: Whether the folder's own Python may run.
        dtype: In which the model runs; "auto" is the one it is stored in.
    """
    model = load_model(folder, "cpu", dtype=dtype, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
        texts.append(continuation(model, tokenizer, ids, tokens)[1])
    return texts


@torch.inference_mode()
def continuation(
    model: Any, tokenizer: Any, ids: torch.Tensor, tokens: int, **more: Any
) -> tuple[list[int], str]:
    """The likeliest tokens after a prompt, and what they say.

    Args:
        model: Causal.
        tokenizer: Its own.
        ids: (1, n), of the prompt, where the model is.
        tokens: How many to write; fewer where the text ends before.
        more: For the model's ``generate``.
    """
    written = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
        **more,
    )
    new = written[0, ids.shape[1] :].tolist()
    return new, str(tokenizer.decode(new, skip_special_tokens=True))
