"""What the gradients of a whole model are expected to take: of a training, and of its weights."""

from compress_core.batch import activation_bytes
from compress_core.head import PIECE_ELEMENTS
from compress_core.learn.loop import kept_activations, runs_again
from tasks.engine.cost import (
    MODEL,
    Cost,
    forward_operations,
    head_operations,
    logits,
    state_bytes,
)
from tasks.engine.dense_model import DenseModel

LOGIT_BYTES = 16  # of a piece: as the model gives them, in float32, their softmax and its gradient


def descent(
    model: DenseModel,
    tokens: int,
    at_once: int,
    length: int,
    *,
    weights: bool = True,
    softmaxes: int = 1,
) -> Cost:
    """A forward and a backward pass; ``held`` and ``disk`` are the caller's.

    The backward pass of a block is worth a forward one for the gradients of what it read, and one
    more for those of its weights; the head is not trained. What is not kept is run again for it:
    blocks, see :func:`compress_core.learn.loop.saving_memory`, and logits in more than one piece.

    Args:
        model: The dense model.
        tokens: Of all passes.
        at_once: Tokens of one.
        length: Of a window.
        weights: Whether the gradients of weights are wanted, too.
        softmaxes: That a logit goes through on its way to the loss.
    """
    layout, head = model.layout, head_operations(model, tokens)
    again, in_pieces = runs_again(layout, at_once), logits(model, at_once) > PIECE_ELEMENTS
    blocks = (2 + weights + again) * (forward_operations(model, tokens, length) - head)
    kept = kept_activations(layout, at_once)
    if again:
        kept = len(layout.blocks) * state_bytes(model, at_once) + activation_bytes(layout, at_once)
    return Cost(
        products={MODEL: blocks + (2 + in_pieces) * head},
        logits=softmaxes * (2 + in_pieces) * logits(model, tokens),
        memory=kept + LOGIT_BYTES * min(PIECE_ELEMENTS, int(logits(model, at_once))),
        whole=True,
    )
