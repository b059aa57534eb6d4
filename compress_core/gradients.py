"""The loss of a text, and its gradient with respect to every layer's weight, one at a time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compress_core.head import Halves
from compress_core.types import LayerRef

FLOAT16_SCALE = 4096.0
"""Of a loss whose gradients are float16: that of a mean over thousands of tokens is below what
float16 tells from zero, for nearly every logit."""

Take = Callable[[LayerRef, Tensor], None]


def loss_scale(dtype: torch.dtype) -> float:
    """What a loss is multiplied by before its backward pass, and its gradients divided by after."""
    return FLOAT16_SCALE if dtype == torch.float16 else 1.0


def token_loss(model: Any, ids: Tensor) -> Tensor:
    """Mean cross-entropy of the predicted tokens of windows (batch, length), in nats."""
    halves = Halves(model)
    rows, targets = halves.hidden(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()

    def measure(logits: Tensor, where: slice) -> Tensor:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return functional.cross_entropy(wide, targets[where], reduction="sum")

    return halves.total(rows, measure) / len(rows)


@contextmanager
def weight_gradients(model: Any, layers: Sequence[LayerRef], take: Take) -> Iterator[float]:
    """While it is open, only the layers' weights need gradients; each is taken and then freed.

    Args:
        model: A whole model; gradients that it holds are dropped.
        layers: Whose weights.
        take: Called in a backward pass of a loss times the scale with a layer and its gradient of
            the loss, (out, in), in float32 at least.

    Yields:
        The scale.
    """
    scale = loss_scale(model.dtype)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    handles = []
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for layer in layers:
            weight = model.get_submodule(layer.name).weight.requires_grad_(True)
            weight.grad = None
            handles.append(weight.register_post_accumulate_grad_hook(_taking(layer, take, scale)))
        yield scale
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in flags:
            parameter.grad = None
            parameter.requires_grad_(flag)


def _taking(layer: LayerRef, take: Take, scale: float) -> Callable[[Tensor], None]:
    @torch.no_grad()
    def hook(weight: Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        assert gradient is not None
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32)) / scale
        take(layer, wide.T if layer.transposed else wide)

    return hook
