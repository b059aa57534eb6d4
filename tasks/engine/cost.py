"""What units are expected to take, by kinds of work that machines do at different speeds."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from compress_core.batch import activation_bytes
from tasks.engine.dense_model import DenseModel

MODEL = "model"  # stands for the dtype that the model computes in
EXACT = "float64"  # what statistics and decompositions are computed in


@dataclass(frozen=True)
class Cost:
    """What a unit is expected to take.

    Attributes:
        products: Dtype (or MODEL) to floating-point operations in matrix products.
        eigen: n³ of every symmetric eigendecomposition (n, n), float64, added up.
        logits: Logits whose softmax is taken, in float64.
        held: Weights that are in memory at once, in the dtype that the model computes in.
        memory: Peak bytes of everything else.
        disk: Bytes stored.
        whole: Whether those are of a whole model, which cannot go block by block.
    """

    products: Mapping[str, float] = field(default_factory=dict)
    eigen: float = 0.0
    logits: float = 0.0
    held: int = 0
    memory: int = 0
    disk: int = 0
    whole: bool = False

    def part(self, units: int) -> "Cost":
        """Of one of so many units that share the work, each with all the memory."""
        products = {dtype: count / units for dtype, count in self.products.items()}
        return replace(self, products=products, logits=self.logits / units)


def add(*products: Mapping[str, float]) -> dict[str, float]:
    """Operations of several counts together, dtype by dtype."""
    dtypes = {dtype for counts in products for dtype in counts}
    return {dtype: sum(counts.get(dtype, 0.0) for counts in products) for dtype in dtypes}


def block_numbers(model: DenseModel, block: int) -> int:
    """Numbers in a block's parameters."""
    return sum(map(model.numbers, model.layout.block_parameters[block]))


def outer_numbers(model: DenseModel) -> int:
    """Numbers in the parameters outside the blocks, the head's own aside."""
    return sum(map(model.numbers, model.layout.outer_parameters))


def block_operations(model: DenseModel, block: int, tokens: int, length: int) -> float:
    """A block's forward: two per weight and token, and attention over windows of ``length``."""
    features = _width(model)
    return 2.0 * tokens * block_numbers(model, block) + 4.0 * tokens * length * features


def forward_operations(model: DenseModel, tokens: int, length: int) -> float:
    """The whole model's forward: all blocks, and the head."""
    blocks = range(len(model.layout.blocks))
    inside = sum(block_operations(model, block, tokens, length) for block in blocks)
    return head_operations(model, tokens) + inside


def head_operations(model: DenseModel, tokens: int) -> float:
    """The head alone."""
    return 2.0 * tokens * _outer(model)[0] * _width(model)


def logits(model: DenseModel, tokens: int) -> float:
    """Logits of so many tokens."""
    return float(tokens * _outer(model)[0])


def streamed_numbers(model: DenseModel) -> int:
    """Numbers that are in memory as it is evaluated block by block: the largest block, and the rest
    of the model.
    """
    blocks = [block_numbers(model, block) for block in range(len(model.layout.blocks))]
    return model.parameters - sum(blocks) + max(blocks)


def hidden_bytes(model: DenseModel, tokens: int) -> int:
    """Hidden states of so many tokens between two blocks, of those that are in the memory of the
    device: an accelerator is handed them batch by batch, where they do not easily fit.
    """
    if model.device.partition(":")[0] != "cpu":
        return 0
    return model.room.held(state_bytes(model, tokens))


def state_bytes(model: DenseModel, tokens: int) -> int:
    """Hidden states of so many tokens between two blocks."""
    dtype: torch.dtype = getattr(torch, model.compute_dtype)
    return tokens * _width(model) * dtype.itemsize


def streamed_bytes(model: DenseModel, tokens: int, models: int, at_once: int) -> int:
    """What is in memory beside weights as models run block by block, side by side.

    Args:
        model: The dense model.
        tokens: Of all windows.
        models: How many models.
        at_once: Tokens of a batch.
    """
    batch = activation_bytes(model.layout, min(tokens, at_once))
    return models * hidden_bytes(model, tokens) + batch


def _width(model: DenseModel) -> int:
    """Numbers in a hidden state."""
    return _outer(model)[1]


def _outer(model: DenseModel) -> tuple[int, ...]:
    """Shape (vocabulary, width) of the embedding: the largest parameter outside the blocks."""
    shapes = [model.shape(name) for name in model.layout.outer_parameters]
    return max((shape for shape in shapes if len(shape) == 2), key=math.prod)
