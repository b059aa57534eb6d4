"""A model folder with a configuration and no weights: its tensors, as that describes them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress_core.errors import ModelError
from compress_core.hf.binding import Binding, bind
from compress_core.hf.checkpoint import DTYPES, Checkpoint, weight_files
from compress_core.hf.companions import WEIGHTS

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def lacks_weights(folder: Path) -> bool:
    """Whether a folder has no weights at all, nor an index that says there should be some."""
    return not any(file.name.endswith(WEIGHTS) for file in folder.iterdir())


@dataclass(frozen=True)
class _Tensor:
    """What a file would say of a tensor; stands for the file and for its slice."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def get_slice(self, key: str) -> "_Tensor":
        return self

    def get_shape(self) -> tuple[int, ...]:
        return self.shape

    def get_dtype(self) -> str:
        return _NAMES[self.dtype]


class Described(Checkpoint):
    """The tensors that a folder without weights would have; none of them can be read.

    It has none before :func:`bind_described` has seen the model. Everything else that is refused of
    a folder is refused of this one, too.
    """

    def _find_files(self) -> list[Path]:
        named = self.config.get("transformers_weights") is not None
        return weight_files(self.folder, self.config) if named else []

    @property
    def first_dtype(self) -> torch.dtype:
        """What a model has whose configuration states no dtype: torch's own."""
        return torch.float32

    def describe(self, tensors: dict[str, Tensor]) -> None:
        """Takes over the shapes and dtypes of tensors."""
        self._handle_of = {n: _Tensor(tuple(t.shape), t.dtype) for n, t in tensors.items()}
        self.names = sorted(tensors)

    def read(self, key: str) -> Tensor:
        """Nothing.

        Raises:
            ModelError: Always.
        """
        raise ModelError(f"{self.folder} has no weights, and so no numbers of {key}: get them")


def bind_described(model: Any, checkpoint: Checkpoint) -> Binding:
    """What a model would be loaded from, had it been saved: every tensor once, by its own name.

    Args:
        model: The model, without weights, in the dtype that it computes in.
        checkpoint: A :class:`Described`, told of the tensors here.
    """
    assert isinstance(checkpoint, Described)
    tied = model.all_tied_weights_keys
    checkpoint.describe({n: t for n, t in model.state_dict().items() if n not in tied})
    return bind(model, checkpoint.names)
