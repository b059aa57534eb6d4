"""A policy of ours for CAP's budget: what each item's absence costs, from gradients.

With m = 1 for everything the model is the dense one. The loss of leaving item i out is ½ h_i to
second order, and h_i is taken as the empirical Fisher information of its mask: the square of
∂J_w/∂m_i, averaged over single windows w. ∂J/∂m_i is uᵀ G v of a component (σ in v) and G_ij S_ij
of an entry, with G the gradient of the loss with respect to the weight: one backward pass serves
every item of every layer, so nothing is drawn and no item is left without a signal. Items are
ranked by that per stored number.

Memory: the model, activations of one window, one layer's gradient at a time, and on the CPU what
the cut needs, 90 bytes per item.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from compress_core.errors import ConfigError, NumericsError
from compress_core.gradients import token_loss, weight_gradients
from compress_core.learn.base import Assignment, Atoms, Learned
from compress_core.learn.loop import (
    TrainState,
    batch_of,
    require_finite,
    run_steps,
    saving_memory,
)
from compress_core.learn.masks import METHOD, MaskPolicy, MaskTraining
from compress_core.learn.worth import Init
from compress_core.types import LayerRef


@dataclass(frozen=True)
class GainPolicy(MaskPolicy):
    """Ranks items by the Fisher information of their masks.

    Attributes:
        steps: Windows whose gradients are taken; each at most once.
        init: What items are worth at first; decides among items without a gradient.
    """

    steps: int = 128
    init: Init = "energy"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"cap needs steps above 0, got {self.steps}")

    @property
    def batch(self) -> int:
        """One window: squares of single windows' gradients are averaged."""
        return 1

    def learn(self, given: Assignment) -> Learned:
        """See :class:`compress_core.learn.base.Learner`."""
        run = MaskTraining(given, self.init)
        gains = _Gains(run)
        steps = min(self.steps, len(run.windows))
        with (
            gains.taking() as gains.scale,
            saving_memory(given.model, given.layout, run.windows.shape[1]),
        ):
            curves = run_steps(steps, gains.step, gains.state, given.training)
        return run.finish(gains.squares / run.items.costs, curves)


class _Gains:
    """Sums of squared gradients of masks."""

    def __init__(self, run: MaskTraining) -> None:
        self.run = run
        self.squares = torch.zeros(len(run.items), dtype=torch.float32)
        self.state = TrainState({"squares": self.squares})
        self.scale = 1.0
        self._step = 0

    def step(self, number: int) -> tuple[Mapping[str, float], str]:
        """One window's gradients."""
        run, training = self.run, self.run.training
        self._step = number
        ids = run.windows[batch_of(number, len(run.windows), 1, training.seed)].to(training.device)
        with torch.enable_grad():
            loss = token_loss(run.model, ids)
            require_finite(loss, METHOD, number, run.model, run.layout, ids)
            (loss * self.scale).backward()
        return {"loss": float(loss.detach()), "kept": 1.0}, f"cap loss {float(loss.detach()):.3f}"

    def taking(self) -> AbstractContextManager[float]:
        """While it is open, only layers' weights have gradients, and each is used and freed."""
        items = self.run.items
        names = [layer.name for layer in items.layers]
        parts = dict(zip(names, items.parts(self.squares), strict=True))

        def add(layer: LayerRef, wide: Tensor) -> None:
            gradient = wide.float()
            if not bool(gradient.isfinite().all()):
                raise NumericsError(
                    f"cap: the gradient of layer {layer.name} is not finite at step {self._step}"
                )
            found = mask_gradients(items.atoms(layer), gradient)
            for total, part in zip(parts[layer.name], found, strict=True):
                total.add_(part.square().to(total.device))

        return weight_gradients(self.run.model, items.layers, add)


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
