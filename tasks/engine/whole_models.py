"""Whole models, loaded where a stage has to have one, and held while others may need them too.

A stage that asks for one names ``LOADING`` in its code.
"""

from pathlib import Path
from typing import Any

from compress_core.folder.load import EigenpressConfig, EigenpressQuantizer
from compress_core.hf.binding import unwrapped
from compress_core.hf.loading import load_model
from tasks.engine.dense_model import FOLDER, DenseModel
from tasks.engine.session import Work
from tasks.engine.units import Unit

LOADING = (load_model, unwrapped, EigenpressConfig, EigenpressQuantizer)
"""What a loaded model's numbers and keys come from: transformers calls the last two by name."""


class Models:
    """The whole models that evaluation needs, loaded when they are needed.

    Args:
        dense: The dense model.
    """

    def __init__(self, dense: DenseModel) -> None:
        self.dense = dense
        self._loaded: dict[str, Any] = {}

    def get(self, work: Work, compressed: Unit | None) -> Any:
        """The dense model, or the one of a ``materialise`` unit; at most one of each is held."""
        slot = "compressed" if compressed else "dense"
        folder = work.artifact(compressed).file(FOLDER) if compressed else self.dense.folder
        held = self._loaded.get(slot)
        if held is None or held[0] != folder:
            self._loaded.pop(slot, None)
            self._loaded[slot] = (folder, self._load(folder) if compressed else self.dense.load())
        return self._loaded[slot][1]

    def _load(self, folder: Path) -> Any:
        return load_model(
            folder,
            self.dense.device,
            trust_remote_code=self.dense.trust_remote_code,
            dtype=self.dense.compute_dtype,
        )

    def drop(self, slot: str | None = None) -> None:
        """Frees one model, "dense" or "compressed", or both."""
        for held in [slot] if slot else list(self._loaded):
            self._loaded.pop(held, None)
