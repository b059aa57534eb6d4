"""What people should be told of what they asked for, and of the model that they brought."""

from collections.abc import Callable, Iterator

import torch

from compress_core.hf.binding import unwrapped
from tasks.engine.dense_model import DenseModel


class Notes(list[str]):
    """What people should be told: together when a run begins, and from then on at once.

    Attributes:
        tell: Tells one; None until a run begins.
    """

    tell: Callable[[str], None] | None = None

    def add(self, note: str) -> None:
        """One more."""
        self.append(note)
        if self.tell is not None:
            self.tell(note)

    def begin(self, tell: Callable[[str], None]) -> None:
        """Tells those that there are, and from now on each as it comes."""
        self.tell = tell
        for note in self:
            tell(note)


def notes_of(model: DenseModel, asked: int, length: int) -> Iterator[str]:
    """What is odd about a model.

    Args:
        model: It.
        asked: Tokens per window that were asked for.
        length: Tokens per window that there are.
    """
    if model.described:
        yield _planned_from_config(model)
    if length < asked:
        yield f"windows are {length} tokens long, not {asked}: the model's context ends there"
    if unused := model.layout.unused:
        more = f" and {len(unused) - 1} more tensors in its files" if unused[1:] else ""
        yield f"not part of the model and so neither counted nor written: {unused[0]}{more}"
    if wrappers := model.layout.wrappers:
        wrapped = next(key for key in model.keys if unwrapped(key, wrappers) != key)
        yield (
            f"tensors have names that transformers does not know, like {wrapped}: read and written "
            f"as {unwrapped(wrapped, wrappers)}"
        )


def _planned_from_config(model: DenseModel) -> str:
    """What a plan is made of where there are no weights."""
    also = "" if model.has_tokenizer else " and no tokenizer"
    said = "" if isinstance(model.config.dtype, torch.dtype) else ", as it names no dtype"
    return (
        f"{model.folder} has no weights{also}: planned from the shapes in its config.json, in "
        f"{model.layout.dtype}{said}; what reads them cannot be looked up and counts as to run"
    )
