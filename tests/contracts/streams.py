"""Tiny models on disk and the streams that run them block by block."""

from pathlib import Path
from typing import Any

import torch

from compress_core.hf.checkpoint import Checkpoint
from compress_core.hf.layout import inspect_model
from compress_core.hf.stream import BlockStream
from tests.contracts.more_families import any_model


def save(family: str, folder: Path, dtype: torch.dtype = torch.float32, **more: Any) -> Path:
    """A tiny model's folder."""
    any_model(family, dtype).save_pretrained(folder, **more)
    return folder


def open_stream(folder: Path) -> BlockStream:
    checkpoint = Checkpoint(folder)
    return BlockStream(checkpoint, inspect_model(checkpoint))
