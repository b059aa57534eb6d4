"""A model's own words: the likeliest continuation of a prompt."""

from pathlib import Path

import torch

from compress_core.hf.loading import load_model
from compress_core.hf.text import load_tokenizer


@torch.inference_mode()
def write_on(folder: Path, prompt: str, tokens: int) -> str:
    """What the model in a folder writes after a prompt, the likeliest token each time.

    Args:
        folder: Dense or compressed model folder with its tokenizer.
        prompt: Not part of what is returned.
        tokens: How many to write; fewer where the text ends before.
    """
    model, tokenizer = load_model(folder, "cpu"), load_tokenizer(folder)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    written = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))
