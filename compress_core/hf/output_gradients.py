"""The Fisher information of every layer's outputs, by one backward pass per window for all layers.

Labels are sampled from the model, at every position by itself. Then gradients of different
positions do not correlate, and E[g gᵀ] is the second derivative of the KL divergence from the model
as it is. With the text's own labels (the "empirical" Fisher information) it is neither: those
gradients have a mean, and weigh positions by how wrong the model is there.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compress_core.curvature import OutputFisher
from compress_core.errors import ModelError, NumericsError, TextError
from compress_core.finite import all_finite
from compress_core.head import Halves
from compress_core.hf.stream import Progress
from compress_core.learn.loop import saving_memory
from compress_core.stats import add_gram, symmetric
from compress_core.types import LayerRef, ModelLayout

DRAWN_ELEMENTS = 1 << 20
"""Probabilities that are added up at a time when labels are drawn; bounds memory, not results."""

Take = Callable[[LayerRef, Tensor], None]
Choose = Callable[[Tensor, slice], Tensor]  # probabilities of rows, which rows -> their labels


def output_fisher(
    model: Any,
    layout: ModelLayout,
    layers: Sequence[LayerRef],
    windows: Tensor,
    *,
    labels: str,
    seed: int,
    products: torch.dtype,
    device: torch.device | str,
    progress: Progress | None = None,
) -> dict[str, OutputFisher]:
    """G of layers: one forward and one backward pass per window, down to the first of them.

    No gradient of a weight is computed. The loss is summed over a window's tokens, which is as
    large as the scale that float16 gives a mean, so it needs none.

    Memory: one window's activations (blocks run again in the backward pass where those are many), a
    piece of logits, and Σ out² float64 numbers for the layers asked for.

    Args:
        model: A whole causal language model on ``device``, in evaluation mode.
        layout: Its layout.
        layers: Whose outputs. A layer that runs several times in a window has its gradients summed.
        windows: (samples, length) token ids.
        labels: "sampled" from the model at every position, or the "text"'s own next tokens; what
            the last token of a window is followed by is not known, and has no loss then.
        seed: Of the sampled labels.
        products: Dtype in which a window's products are formed; the sums are float64.
        device: Where the model is.
        progress: Called after each window.

    Returns:
        Layer name to its G, on the CPU.

    Raises:
        TextError: No windows.
        ModelError: A layer on whose outputs the model's logits do not depend.
        NumericsError: Logits or a gradient that is not finite; names window and layer.
    """
    if windows.ndim != 2 or 0 in windows.shape:
        raise TextError(f"windows have shape {tuple(windows.shape)}; expected (samples, length)")
    sums = {
        layer.name: torch.zeros(
            layer.out_features, layer.out_features, dtype=torch.float64, device=device
        )
        for layer in layers
    }
    halves, done, reached = Halves(model), 0, set[str]()

    def add(layer: LayerRef, gradient: Tensor) -> None:
        if not all_finite(gradient):
            raise NumericsError(
                f"the gradient of layer {layer.name}'s output in window {done} is not finite"
            )
        add_gram(sums[layer.name], gradient.reshape(-1, layer.out_features).to(products))
        reached.add(layer.name)

    with output_gradients(model, layers, add), saving_memory(model, layout, windows.shape[1]):
        for window, drawn in zip(windows, uniforms(tuple(windows.shape), seed), strict=True):
            with torch.enable_grad():
                hidden = halves.hidden(window[None].to(device))
            rows = hidden.detach().flatten(0, -2)
            choose = _following(window) if labels == "text" else _sampled(drawn)
            slope = _slope(halves, rows, choose, done)
            if hidden.requires_grad:
                torch.autograd.backward(hidden, slope.view_as(hidden))
            if missing := [layer.name for layer in layers if layer.name not in reached]:
                raise ModelError(f"the model's logits do not depend on layer {missing[0]}")
            done += 1
            if progress is not None:
                progress(done, len(windows))
    tokens = windows.numel()  # of the sums one at a time is held twice
    return {name: OutputFisher(tokens, symmetric(sums.pop(name)).cpu()) for name in list(sums)}


def _slope(halves: Halves, rows: Tensor, choose: Choose, window: int) -> Tensor:
    """Gradient of the labels' summed loss by the last hidden states, piece by piece.

    By the logits it is p − e_y, or nothing where there is no label: no loss is formed.
    """
    slope = torch.empty_like(rows)
    for piece in halves.pieces(len(rows)):
        with torch.enable_grad():
            part = rows[piece].requires_grad_()
            logits = halves.logits(part)
        p = logits.detach().softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        if not all_finite(p):
            raise NumericsError(f"the logits of window {window} are not finite")
        labels = choose(p, piece).to(p.device)
        p[torch.arange(len(p), device=p.device), labels] -= 1
        p[labels < 0] = 0
        (slope[piece],) = torch.autograd.grad(logits, part, p.to(logits.dtype))
    return slope


def _sampled(drawn: Tensor) -> Choose:
    """Labels of a window from the model's probabilities and a number per token."""
    return lambda p, piece: draw_labels(p, drawn[piece].to(p.device))


def _following(window: Tensor) -> Choose:
    """A window's own next tokens; -1 behind the last."""
    labels = torch.cat([window[1:], window.new_full((1,), -1)])
    return lambda p, piece: labels[piece]


def uniforms(shape: tuple[int, ...], seed: int) -> Tensor:
    """What decides the labels, float64 in [0, 1): a number per token, whatever is computed when."""
    generator = torch.Generator().manual_seed(seed % (1 << 62))
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def draw_labels(p: Tensor, drawn: Tensor) -> Tensor:
    """A label per row, by inverting its distribution function: the same whatever the pieces.

    Args:
        p: Probabilities (rows, vocabulary).
        drawn: (rows,) float64, uniform in [0, 1).

    Returns:
        int64 (rows,).
    """
    labels = []
    for part, uniform in zip(*_parts(p, drawn), strict=True):
        below = part.to(torch.float64).cumsum(-1)
        reached = uniform[:, None] * below[:, -1:]
        labels.append(torch.searchsorted(below, reached, right=True)[:, 0])
    return torch.cat(labels).clamp_max(p.shape[1] - 1)


def _parts(p: Tensor, drawn: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    rows = max(1, DRAWN_ELEMENTS // p.shape[1])
    return p.split(rows), drawn.split(rows)


@contextmanager
def output_gradients(model: Any, layers: Sequence[LayerRef], take: Take) -> Iterator[None]:
    """While it is open, backward passes hand over the gradients of layers' outputs.

    No parameter needs a gradient meanwhile. The outputs of the first layers, which then depend on
    nothing that is differentiated, become what is differentiated, so nothing before them is.

    Args:
        model: A whole model.
        layers: Whose outputs.
        take: Called with a layer and the gradient (..., out) of each of its outputs.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    handles = []
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for layer in layers:
            module: nn.Module = model.get_submodule(layer.name)
            handles.append(module.register_forward_hook(_watching(layer, take)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _watching(layer: LayerRef, take: Take) -> Callable[..., Tensor | None]:
    def hook(_: Any, __: Any, output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        watched = output if output.requires_grad else output.detach().requires_grad_()
        watched.register_hook(lambda gradient: take(layer, gradient))
        return watched

    return hook
