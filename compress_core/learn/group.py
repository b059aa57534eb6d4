"""A policy of ours for CAP's budget: one threshold per layer and part, learned by policy gradient.

An item's score is log worth − z of its group, the groups being the components and the entries of
every layer; the cut by score always spends the budget, so that z says only who gets more of it.
z ~ N(mean, spread²); a step draws antithetic pairs mean ± spread · ε, measures the loss of each
cut on the same windows, forward only, and moves against

    g = Σ_k (J_k − mean of the others' J) ε_k / (samples · spread),

advantages divided by their own deviation (losses of bad cuts are far off). With 2 × layers
variables instead of one per entry, and all draws compared with one another, thirty steps do learn.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compress_core.errors import ConfigError
from compress_core.learn.base import Assignment, Learned
from compress_core.learn.loop import batch_of
from compress_core.learn.masks import MaskPolicy, MaskTraining, generator_of
from compress_core.learn.worth import Init


@dataclass(frozen=True)
class GroupPolicy(MaskPolicy):
    """A threshold for each layer's components and one for its entries.

    Attributes:
        updates: Steps of policy gradient.
        batch: Windows in a step; each draw sees all of them.
        eta: Step size, in natural logarithms of worth.
        pairs: Antithetic pairs of draws in a step.
        spread: Standard deviation of a draw.
        init: What items are worth at first.
    """

    updates: int = 30
    batch: int = 8
    eta: float = 0.3
    pairs: int = 4
    spread: float = 0.3
    init: Init = "energy"

    def __post_init__(self) -> None:
        positive = all(0 < value < math.inf for value in (self.eta, self.spread))
        if min(self.updates, self.batch, self.pairs) < 1 or not positive:
            raise ConfigError(
                f"cap needs steps and a finite eta above 0, got {self.updates} and {self.eta:g}"
            )

    def learn(self, given: Assignment) -> Learned:
        """See :class:`compress_core.learn.base.Learner`; never worse than where it began."""
        run = MaskTraining(given, self.init)
        policy = _Policy(self, run)
        curves = run.run(policy, self.updates)
        return run.finish(curves, lambda: policy.score(policy.mean))


class _Policy:
    """The mean of the thresholds."""

    def __init__(self, options: GroupPolicy, run: MaskTraining) -> None:
        self.options, self.run = options, run
        self.mean = torch.zeros(2 * len(run.items.layers), dtype=torch.float64)

    def begin(self) -> Mapping[str, Tensor]:
        """Thresholds of zero."""
        return {"thresholds": self.mean}

    def score(self, z: Tensor) -> Tensor:
        """Of every item, at thresholds z (2 · layers,): components' and entries' in turn."""
        found = self.run.worth.log()
        for number, (components, entries) in enumerate(self.run.items.parts(found)):
            components.sub_(float(z[2 * number]))
            entries.sub_(float(z[2 * number + 1]))
        return found

    def step(self, number: int) -> tuple[Mapping[str, float], str]:
        """One step of policy gradient."""
        options, run = self.options, self.run
        picks = batch_of(number, len(run.windows), options.batch, run.training.seed)
        generator = generator_of(run.training.seed, number)
        half = torch.randn(options.pairs, len(self.mean), generator=generator, dtype=torch.float64)
        noise = torch.cat([half, -half])
        losses = torch.stack(
            [self._loss(self.mean + options.spread * e, run.windows[picks], number) for e in noise]
        )
        advantage = leave_one_out(losses)
        scale = float(advantage.square().mean().sqrt())
        if scale > 0:
            slope = (advantage / scale) @ noise / (len(noise) * options.spread)
            self.mean.sub_(options.eta * options.spread * slope)
        loss = float(losses.mean())
        kept = run.items.budget / run.items.total
        measured = {"loss": loss, "baseline": loss, "kept": kept}
        return measured, f"loss {loss:.3f} kept {kept:.3f}"

    def _loss(self, z: Tensor, windows: Tensor, number: int) -> Tensor:
        items = self.run.items
        items.put_cut(*items.cut(self.score(z)))
        return self.run.loss(windows, number)


def leave_one_out(losses: Tensor) -> Tensor:
    """Each loss less the mean of the others, (draws,); zeros for a single draw."""
    count = len(losses)
    return (losses - losses.mean()) * (count / (count - 1) if count > 1 else 0.0)
