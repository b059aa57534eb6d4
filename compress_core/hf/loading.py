"""Loads a whole model, dense or compressed, where it must be whole, and checks that one loads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import compress_core.folder.load  # noqa: F401  registers the compressed format
from compress_core.errors import ModelError
from compress_core.hf.text import load_tokenizer

_PROBE = "The quick brown fox: 3.14 <tags>, naïve café\n"


def load_model(
    folder: str | Path,
    device: torch.device | str = "cpu",
    *,
    trust_remote_code: bool = False,
    dtype: str = "auto",
    key_mapping: Mapping[str, str] | None = None,
) -> Any:
    """The model in ``folder``, ready to evaluate.

    Args:
        folder: A model folder; a compressed one loads as its stock class.
        device: Where it goes.
        trust_remote_code: Whether the folder's own Python may run.
        dtype: In which it runs: "float32" and so on; "auto" is the one it is stored in.
        key_mapping: Patterns in the files' keys that are replaced before anything else is done.
    """
    logging.disable_progress_bar()  # we have our own, and stderr may be somebody's log
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        local_files_only=True,
        key_mapping=key_mapping,
    )
    return model.to(device).eval()


def check_loads(folder: Path, tokenizer: Any, *, trust_remote_code: bool = False) -> None:
    """Loads a folder as its user will, the model without holding its weights.

    Args:
        folder: The folder that is about to be published.
        tokenizer: The dense model's; the folder's must do the same.
        trust_remote_code: Whether the folder's own Python may run.

    Raises:
        ModelError: Tokenizer or model do not load, or not as they should.
    """
    found = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    if _does(found) != _does(tokenizer):
        raise ModelError(
            f"the tokenizer of the compressed folder ({type(found).__name__}) does not do what the "
            f"dense model's ({type(tokenizer).__name__}) does: a file that it reads was not copied"
        )
    logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            device_map="meta",
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"the compressed folder does not load again: {reason}") from error
    info = loaded[1]
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if info[what]:
            raise ModelError(
                f"the compressed folder does not load as it was written: {what.replace('_', ' ')} "
                f"{sorted(map(str, info[what]))[0]}, {len(info[what])} in all"
            )


def _does(tokenizer: Any) -> tuple[str, int, list[int]]:
    return type(tokenizer).__name__, len(tokenizer), list(tokenizer(_PROBE)["input_ids"])
