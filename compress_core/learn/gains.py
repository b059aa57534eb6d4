"""What each item's absence costs, from gradients: a first ranking of ours for CAP's budget.

With m = 1 for everything the model is the dense one. The loss of leaving item i out is ½ h_i to
second order, and h_i is taken as the empirical Fisher information of its mask: the square of
∂J_w/∂m_i, averaged over single windows w. ∂J/∂m_i is uᵀ G v of a component (σ in v) and G_ij S_ij
of an entry, with G the gradient of the loss with respect to the weight: one backward pass serves
every item of every layer, so nothing is drawn and no item is left without a signal.

Memory: the model, activations of one window, one layer's gradient at a time, and 4 bytes per item.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from compress_core.errors import NumericsError
from compress_core.finite import all_finite
from compress_core.gradients import token_loss, weight_gradients
from compress_core.learn.base import Atoms
from compress_core.learn.items import Items
from compress_core.learn.loop import Training, batch_of, require_finite, saving_memory
from compress_core.learn.worth import METHOD
from compress_core.types import LayerRef, ModelLayout


class Gains:
    """Sums of squared gradients of masks, per stored number.

    Args:
        model: The dense model.
        layout: Its layout.
        items: Its items.
        worth: What is added to, float32 (items,).
    """

    def __init__(self, model: Any, layout: ModelLayout, items: Items, worth: Tensor) -> None:
        self.model, self.layout, self.items = model, layout, items
        names = [layer.name for layer in items.layers]
        self._parts = dict(zip(names, items.parts(worth), strict=True))
        self._scale: float | None = None
        self._step = 0

    def step(
        self, number: int, windows: Tensor, training: Training, stack: ExitStack
    ) -> tuple[Mapping[str, float], str]:
        """One window's gradients.

        Args:
            number: Of the step.
            windows: Token ids (samples, length); each is taken once.
            training: Its seed says in which order.
            stack: While it is open, layers' weights have gradients; the first step enters that.
        """
        self._step = number
        if self._scale is None:
            weights = weight_gradients(self.model, self.items.layers, self._add)
            self._scale = stack.enter_context(weights)
            stack.enter_context(saving_memory(self.model, self.layout, windows.shape[1]))
        ids = windows[batch_of(number, len(windows), 1, training.seed)].to(training.device)
        with torch.enable_grad():
            loss = token_loss(self.model, ids)
            require_finite(loss, METHOD, number, self.model, self.layout, ids)
            (loss * self._scale).backward()
        found = float(loss.detach())
        return {"loss_dense": found}, f"gradients, loss {found:.3f}"

    def _add(self, layer: LayerRef, wide: Tensor) -> None:
        """Adds the squares of a layer's gradient; it is used and freed."""
        gradient = wide.float()
        if not all_finite(gradient):
            raise NumericsError(
                f"cap: the gradient of layer {layer.name} is not finite at step {self._step}"
            )
        found = mask_gradients(self.items.atoms(layer), gradient)
        prices = (layer.atom_cost, 1)
        for total, part, price in zip(self._parts[layer.name], found, prices, strict=True):
            total.add_(part.square().to(total.device), alpha=1 / price)


def mask_gradients(atoms: Atoms, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives of the loss by the masks of a layer's components and entries.

    Args:
        atoms: The layer's.
        gradient: Of the loss with respect to its weight, (out, in).
    """
    device = gradient.device
    of_components = ((atoms.ut.to(device) @ gradient) * atoms.v.to(device)).sum(dim=1)
    if atoms.sparse is None:
        return of_components, gradient.new_zeros(0)
    at_entries = gradient[atoms.sparse.mask.to(device)]
    return of_components, at_entries * atoms.sparse.values.to(device)
