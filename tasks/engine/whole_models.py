"""A whole model, loaded where a stage has to have one, and held while others may need it too.

A stage that asks for one names ``LOADING`` in its code.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from compress_core.folder.load import EigenpressConfig, EigenpressQuantizer
from compress_core.hf.binding import unwrapped
from compress_core.hf.loading import load_model
from tasks.engine.dense_model import FOLDER, DenseModel
from tasks.engine.units import Unit
from tasks.engine.work import Work

LOADING = (load_model, unwrapped, EigenpressConfig, EigenpressQuantizer)
"""What a loaded model's numbers and keys come from: transformers calls the last two by name."""


class Models:
    """Whole models, one at a time.

    Args:
        dense: The dense model.
    """

    def __init__(self, dense: DenseModel) -> None:
        self.dense = dense
        self._held: tuple[Path, Any] | None = None
        self._users: list[Callable[[], None]] = []

    def let_know(self, user: Callable[[], None]) -> None:
        """Calls a user of the model, once, when it is dropped: who keeps it holds it in memory."""
        self._users.append(user)

    def get(self, work: Work, compressed: Unit | None) -> Any:
        """The dense model, or the one of a ``materialise`` unit."""
        folder = work.artifact(compressed).file(FOLDER) if compressed else self.dense.folder
        if self._held is None or self._held[0] != folder:
            self.drop()
            self._held = folder, self._load(folder) if compressed else self.dense.load()
        return self._held[1]

    def _load(self, folder: Path) -> Any:
        return load_model(
            folder,
            self.dense.device,
            trust_remote_code=self.dense.trust_remote_code,
            dtype=self.dense.compute_dtype,
        )

    def drop(self) -> None:
        """Frees it."""
        self._held = None
        while self._users:
            self._users.pop()()
