"""How much each input of a layer matters to the loss, by the gradients of a whole model.

FWSVD (arXiv 2207.00112) weighs a weight's entries by their empirical Fisher information, the mean
square of their gradients. One weight per column is what a truncation can use, so only the sum over
rows is kept, and a window's gradients are squared and freed as soon as each is there.
"""

import math
from typing import Any

import torch
from torch import Tensor

from compress_core.errors import NumericsError, TextError
from compress_core.finite import all_finite
from compress_core.gradients import token_loss, weight_gradients
from compress_core.hf.stream import Progress
from compress_core.learn.loop import saving_memory
from compress_core.types import LayerRef, ModelLayout


def fisher_columns(
    model: Any,
    layout: ModelLayout,
    windows: Tensor,
    *,
    device: torch.device | str,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Empirical Fisher information of every layer's weight, summed over rows.

    Each window is by itself: its loss is the mean cross-entropy of its predicted tokens in nats,
    and what is averaged over windows is the square of the gradient g (out, in), summed over out.

    Memory: one window's activations (a block's, where they are many), one gradient at a time, and a
    float64 number per column.

    Args:
        model: A whole causal language model on ``device``, in evaluation mode; gradients that it
            holds are dropped.
        layout: Its layout.
        windows: (samples, length) token ids.
        device: Where the model is.
        progress: Called after each window.

    Returns:
        Layer name to (in,) float64 on the CPU, in nats squared per squared unit of weight.

    Raises:
        TextError: No windows, or windows with nothing to predict.
        NumericsError: A loss or gradient that is not finite; names the window, and the layer.
    """
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        shape = tuple(windows.shape)
        raise TextError(f"windows have shape {shape}; expected (n >= 1, length >= 2)")
    sums = {
        layer.name: torch.zeros(layer.in_features, dtype=torch.float64, device=device)
        for layer in layout.layers
    }
    done = 0

    def add(layer: LayerRef, gradient: Tensor) -> None:
        squares = gradient.double().square_().sum(0)
        if not all_finite(squares):
            raise NumericsError(
                f"fisher: the gradient of layer {layer.name} in window {done} is not finite"
            )
        sums[layer.name].add_(squares)

    with (
        weight_gradients(model, layout.layers, add) as scale,
        saving_memory(model, layout, windows.shape[1]),
        torch.enable_grad(),
    ):
        for window in windows:
            loss = token_loss(model, window[None].to(device))
            if not math.isfinite(float(loss.detach())):
                raise NumericsError(f"fisher: the loss of window {done} is not finite")
            (loss * scale).backward()
            done += 1
            if progress is not None:
                progress(done, len(windows))
    return {name: (total / len(windows)).cpu() for name, total in sums.items()}
