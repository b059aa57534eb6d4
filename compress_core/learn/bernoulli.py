"""CAP's stage 2 to the letter (arXiv 2505.03801): keep-probabilities by policy gradient.

Every singular triple and every sparse entry has a probability s of being kept, all layers under one
budget K. A step draws masks m ~ Bern(s), measures the loss J of the model that they make, forward
only, and moves against REINFORCE's estimate with a moving baseline δ:

    δ ← β δ + (1 − β) J,   g = (J − δ) (m − s) / (s (1 − s) + ε),   s ← Π(s − η g)

with Π the nearest point of {0 ≤ s ≤ 1, Σ cost · s ≤ K}. In the end what has the largest s stays.

Open in the paper, and ours: s begins as sigmoid(log worth − θ) with Σ cost · s = K (see ``worth``);
the sliding window of 5 is read as β = 1 − 1/5; δ begins as the loss of one more draw, so that the
first step moves too. Three steps are three numbers for all the probabilities, and what they made
is returned even where it is worse than the first ranking; ``entry`` is ours, and learns.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compress_core.errors import ConfigError
from compress_core.learn.base import Assignment, Learned
from compress_core.learn.keep import probabilities, project
from compress_core.learn.loop import batch_of
from compress_core.learn.masks import MaskPolicy, MaskTraining, generator_of
from compress_core.learn.worth import Init

EPSILON = 1e-6


@dataclass(frozen=True)
class PrintedPolicy(MaskPolicy):
    """A probability for every item, as printed.

    Attributes:
        updates: Steps of policy gradient.
        batch: Windows in a step.
        eta: Step size η.
        window: Losses that the baseline averages over.
        init: What items are worth at first.
    """

    updates: int = 3
    batch: int = 128
    eta: float = 0.05
    window: int = 5
    init: Init = "energy"

    def __post_init__(self) -> None:
        if self.updates < 1 or self.batch < 1 or self.window < 1 or not 0 < self.eta < math.inf:
            raise ConfigError(
                f"cap needs steps, windows and a finite eta above 0, got {self.updates}, "
                f"{self.window} and {self.eta:g}"
            )

    def learn(self, given: Assignment) -> Learned:
        """See :class:`compress_core.learn.base.Learner`."""
        run = MaskTraining(given, self.init)
        policy = _Policy(self, run)
        curves = run.run(policy, self.updates)
        return run.finish(curves, lambda: policy.s, better=False)


class _Policy:
    """Probabilities and baseline."""

    def __init__(self, options: PrintedPolicy, run: MaskTraining) -> None:
        self.options, self.run = options, run
        self.s = torch.zeros(0)
        self.baseline = torch.full((), torch.nan, dtype=torch.float64)

    def begin(self) -> Mapping[str, Tensor]:
        """First probabilities."""
        items = self.run.items
        self.s = probabilities(self.run.worth.log(), items.prices, items.budget)
        return {"probabilities": self.s, "baseline": self.baseline}

    def step(self, number: int) -> tuple[Mapping[str, float], str]:
        """One step of policy gradient."""
        options, items, training = self.options, self.run.items, self.run.training
        picks = batch_of(number, len(self.run.windows), options.batch, training.seed)
        windows = self.run.windows[picks]
        if number == 0:
            self.baseline.copy_(self._loss(windows, number, draw=1))
        loss = self._loss(windows, number, draw=0)
        beta = 1 - 1 / options.window
        self.baseline.mul_(beta).add_((1 - beta) * loss)
        advantage = float(loss - self.baseline)
        stored = 0.0
        for layer, s in enumerate(items.parts(self.s)):
            for part, mask in enumerate(self._masks(number, 0, layer)):
                s[part].sub_(options.eta * reinforce(advantage, mask, s[part]))
                stored += int(mask.sum()) * (1 if part else items.layers[layer].atom_cost)
        project(self.s, items.prices, items.budget)
        kept = stored / items.total
        measured = {"loss": float(loss), "baseline": float(self.baseline), "kept": kept}
        return measured, f"loss {float(loss):.3f} kept {kept:.3f}"

    def _loss(self, windows: Tensor, number: int, draw: int) -> Tensor:
        self.run.items.put(lambda layer: self._masks(number, draw, layer))
        return self.run.loss(windows, number)

    def _masks(self, number: int, draw: int, layer: int) -> tuple[Tensor, Tensor]:
        """A layer's masks; drawn again from the same generator they are the same."""
        generator = generator_of(self.run.training.seed, number, draw, layer)
        components, entries = self.run.items.parts(self.s)[layer]
        return (
            torch.bernoulli(components, generator=generator).bool(),
            torch.bernoulli(entries, generator=generator).bool(),
        )


def reinforce(advantage: float, mask: Tensor, s: Tensor) -> Tensor:
    """(J − δ) (m − s) / (s (1 − s) + ε): the estimate of ∂E[J]/∂s from one draw m ~ Bern(s)."""
    return advantage * (mask.to(s) - s) / (s * (1 - s) + EPSILON)
