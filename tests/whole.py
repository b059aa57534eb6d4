"""What evaluation finds of models that are in memory whole: what block by block has to come to."""

from typing import Any

from torch import Tensor, nn

from compress_core import evaluate
from compress_core.evaluate import TextMetrics
from compress_core.head import Halves


class Whole:
    """A model in memory, as evaluation sees it."""

    def __init__(self, model: nn.Module) -> None:
        self.halves = Halves(model.eval())
        self.logits = self.halves.logits
        self.pieces = self.halves.pieces

    def hidden(self, first: int, ids: Tensor) -> Tensor:
        return self.halves.hidden(ids)


def perplexity_and_kl(
    model: nn.Module, windows: Tensor, *, reference: nn.Module | None = None, **how: Any
) -> TextMetrics:
    dense = None if reference is None else Whole(reference)
    return evaluate.perplexity_and_kl(Whole(model), windows, reference=dense, **how)
