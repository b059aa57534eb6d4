"""The training of a recovery, step by step: trials of η, then the training proper, per side.

Everything that changes is in one :class:`TrainState`, so that it can stop after any step.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compress_core.learn.loop import Training, TrainState, batch_of
from compress_core.learn.teacher import Teacher
from compress_core.recover.loss import Objective
from compress_core.recover.parts import (
    LowRankUpdate,
    Part,
    Stored,
    Whole,
    stored_tensors,
)
from compress_core.recover.settings import LADDER, Recovery, best_trial, next_trial
from compress_core.recover.windows import split_windows
from compress_core.types import ModelLayout

TRIAL_WARM_UP = 0.25  # share of a trial
PATIENCE = 6  # checks without a better one after which the best state comes back
CUTS = 4  # times that it comes back before the side ends
DIVERGED = 1.5  # times the start's held-back loss, above which it comes back at once
GAIN = 1e-6  # nats per token by which a state is better; less may be rounding
BETAS = (0.9, 0.95)
EPSILON = 1e-12  # gradients of large models are small, and steps do not depend on their size
NUMBERS = ("start", "best", "eta", "waited", "cuts")


class RecoveryRun:
    """A recovery under way.

    Args:
        model: The whole compressed model, which it changes.
        layout: The dense model's layout.
        recovery: How.
        teacher: The dense model's predictions.
        training: Windows, device, checkpoints.
        dtypes: As of :func:`compress_core.recover.parts.stored_tensors`.
    """

    def __init__(
        self,
        model: Any,
        layout: ModelLayout,
        recovery: Recovery,
        teacher: Teacher,
        training: Training,
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        self.recovery = recovery
        self.trained, self.held = split_windows(training.windows, recovery.held_back, recovery.seed)
        model.requires_grad_(False)
        generator = torch.Generator().manual_seed(recovery.seed)
        self.parts = [_part(found, recovery, generator) for found in stored_tensors(model, dtypes)]
        self.objective = Objective(model, layout, teacher, training, recovery.text, recovery.batch)
        self.leaves = {
            f"{part.stored.name}.{number}": leaf
            for part in self.parts
            for number, leaf in enumerate(part.leaves)
        }
        self.best = {name: leaf.cpu().clone() for name, leaf in self.leaves.items()}
        self.numbers = {name: torch.zeros((), dtype=torch.float64) for name in NUMBERS}
        self.trials = torch.full((recovery.sides, len(LADDER)), torch.nan, dtype=torch.float64)
        self.optimizer = _optimizer(self.parts)
        self.state = TrainState(self._named(), self.optimizer)
        self._side: int | None = None
        self._active: list[Part] = []  # of that side

    def _named(self) -> Mapping[str, Tensor]:
        kinds = {"leaf": self.leaves, "best": self.best, "number": self.numbers}
        named = {f"{kind}.{name}": t for kind, found in kinds.items() for name, t in found.items()}
        return named | {"trials": self.trials}

    def step(self, number: int) -> tuple[Mapping[str, float], str]:
        """Does a step: what it measured, and a word on where the training stands."""
        recovery = self.recovery
        side, place = divmod(number, recovery.search + recovery.proper)
        self._turn_to(side)
        if number == 0:
            start = self.objective.mean(self.held, number)
            self.numbers["start"].fill_(start)
            self.numbers["best"].fill_(start)
        if not self._active:
            return {}, "nothing on this side"
        if place < recovery.search:
            return self._try(side, place % recovery.trial)
        return self._train(side, place - recovery.search, number)

    def _turn_to(self, side: int) -> None:
        """Lets the parts of a side be trained, and puts all of them in place."""
        if side == self._side:
            return
        self._side = side
        self._active = []
        for part in self.parts:
            last = part.stored.inward
            wanted = self.recovery.sides == 1 or last == bool(side)
            part.stored.tensor.requires_grad_(wanted)
            part.put()
            if wanted:
                self._active.append(part)

    def _try(self, side: int, step: int) -> tuple[Mapping[str, float], str]:
        losses = self.trials[side]
        rung = next_trial(losses)
        if rung is None:
            return {}, "trials"
        if step == 0:
            self.restore()
        last = step + 1 == self.recovery.trial
        warm = min(1.0, (step + 1) / (TRIAL_WARM_UP * self.recovery.trial))
        measured = self._descend(step, LADDER[rung] * warm, None)
        if last:
            losses[rung] = measured["tried"] = self.objective.mean(self.held)
        return measured, f"trying steps of {LADDER[rung]:g}"

    def _train(self, side: int, step: int, number: int) -> tuple[Mapping[str, float], str]:
        numbers, recovery = self.numbers, self.recovery
        if step == 0:
            self.restore()
            numbers["eta"].fill_(LADDER[best_trial(self.trials[side])])
            numbers["waited"].zero_()
            numbers["cuts"].zero_()
        if numbers["cuts"] > CUTS:
            return {}, "ended early"
        eta = float(numbers["eta"]) * recovery.eta_share(step)
        measured = self._descend(step, eta, number)
        if recovery.checks(step):
            measured["held_back"] = self._check()
        start, best = float(numbers["start"]), float(numbers["best"])
        return measured, f"KL {measured['kl']:.4g}, held back {start:.4g} → {best:.4g}"

    def _descend(self, step: int, eta: float, number: int | None) -> dict[str, float]:
        """One step of size η; ``number`` is None in a trial, which may end anyhow."""
        recovery = self.recovery
        picks = batch_of(step, len(self.trained), recovery.batch, recovery.seed)
        measured = self.objective.descend(self.trained[picks], number)
        for part in self._active:
            part.pull(self.objective.scale)
        for group in self.optimizer.param_groups:
            group["lr"] = eta * group["scale"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        for part in self._active:
            part.put()
        return {**measured, "step_size": eta}

    def _check(self) -> float:
        """Measures the held-back loss, and keeps the state or goes back to the best one."""
        loss, numbers = self.objective.mean(self.held), self.numbers
        if loss < numbers["best"] - GAIN:
            numbers["best"].fill_(loss)
            numbers["waited"].zero_()
            for name, leaf in self.leaves.items():
                self.best[name].copy_(leaf)
            return loss
        numbers["waited"] += 1
        if numbers["waited"] >= PATIENCE or not loss <= DIVERGED * numbers["start"]:
            self.restore()
            numbers["eta"] /= 2
            numbers["cuts"] += 1
            numbers["waited"].zero_()
        return loss

    @torch.no_grad()
    def restore(self) -> None:
        """Goes back to the best state."""
        for name, leaf in self.leaves.items():
            leaf.copy_(self.best[name])
        self.optimizer.state.clear()
        for part in self.parts:
            part.put()

    def result(self) -> dict[str, Tensor]:
        """The stored tensors in the best state, by name."""
        self.restore()
        return {part.stored.name: part.stored.get() for part in self.parts}

    def report(self) -> dict[str, float]:
        """Held-back loss before and after, and windows on either side."""
        numbers = {name: float(self.numbers[name]) for name in ("start", "best")}
        return {**numbers, "trained": float(len(self.trained)), "held_back": float(len(self.held))}


def _part(stored: Stored, recovery: Recovery, generator: torch.Generator) -> Part:
    """A bias has no rank to speak of and is trained whole either way."""
    if recovery.how == "factors" or (stored.tensor.ndim < 2 and stored.mask is None):
        return Whole(stored)
    return LowRankUpdate(stored, recovery.rank, generator)


def _optimizer(parts: list[Part]) -> torch.optim.Optimizer:
    groups = [
        {"params": [leaf], "scale": scale, "lr": 0.0}
        for part in parts
        for leaf, scale in zip(part.leaves, part.scales, strict=True)
    ]
    return torch.optim.Adam(groups or [torch.zeros(1)], betas=BETAS, eps=EPSILON)
