"""Loads a whole model, dense or compressed, where a stage must have it whole."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import compress_core.hf.quantizer  # noqa: F401  registers the compressed format


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
