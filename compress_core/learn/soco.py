"""SoCo's training (arXiv 2502.15092): a score on every singular value, in three phases.

Layers are frozen spectra, W′ = U (Σ ⊙ S) Vᵀ, and d is added to their outputs; the scores S and d
are trained on the whole model by KL to the dense one. Phase 1 presses the stored share down to the
target. Phase 2 oscillates around it: there is pressure only while more than the target is stored,
so that what was cut too far recovers. The pressure is added to Adam's step of the KL and never to
its moments (:meth:`_Run._press`); the polarisation, in units of the KL, is. Phase 3 drives scores
away from the threshold, then drops for good what is below it, at the exact budget, and trains what
stays on, so that the cut costs nothing. What of this is reconstruction is said in ``methods.soco``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from compress_core.allocate.base import check_one_component_each
from compress_core.errors import ConfigError
from compress_core.forms.names import PLAIN
from compress_core.head import Halves
from compress_core.learn.base import Assignment, Learned, train_whole
from compress_core.learn.gated import GatedSpectra, Map, Order
from compress_core.learn.loop import (
    TrainState,
    check_samples,
    descend,
    next_batch,
    require_finite,
    require_finite_parameters,
)
from compress_core.learn.spectrum import Spectra, choose, install, overlap
from compress_core.types import LayerRef

FIRST_PRESSURE, RAMP = 0.01, 1e4  # nats for the whole share, and its growth over phase 1
MOST_PRESSURE = 1e6  # above it only float32 would be strained
UP, DOWN = 1.02, 0.97  # how it follows the share after that
NEAR = 0.2  # distance of the share from the target below which it is pressed less
SETTLING = 0.5  # part of phase 3 after which what stays is settled
LAST_RATE = 0.1  # of the learning rates, at the end of their half cosine


@dataclass(frozen=True)
class LearnSpectrum:
    """The three phases.

    Attributes:
        phase1: Steps of rapid compression.
        phase2: Steps of oscillation around the target.
        phase3: Steps of polarisation.
        batch: Windows in a step.
        map: From raw parameters to scores.
        threshold: Scores below it are dropped in the end.
        rate: Learning rate of the raw scores (AdamW).
        deviation: Learning rate of d, in units of a layer's output; 0 leaves d out.
        polarise: Weight of phase 3's term.
        gate_from: Phase from which a component below the threshold does not contribute: 1, or 3 to
            let it until then.
        order: "score": what survives is free; "sigma": in every layer the largest singular values
            survive, as in all other methods, and only their number and scores are learned.
        form: In which products are stored, and so what a component costs.
    """

    phase1: int = 80
    phase2: int = 220
    phase3: int = 100
    batch: int = 4
    map: Map = "softplus"
    threshold: float = 0.5
    rate: float = 0.05
    deviation: float = 1e-3
    polarise: float = 1.0
    gate_from: int = 1
    order: Order = "score"
    form: str = PLAIN

    def __post_init__(self) -> None:
        if min(self.phase1, self.phase2, self.phase3) < 0 or self.phase1 < 1 or self.batch < 1:
            raise ConfigError(
                "soco needs phase1 >= 1, phase2 >= 0, phase3 >= 0 and batch >= 1; got "
                f"{self.phase1}, {self.phase2}, {self.phase3} and {self.batch}"
            )
        rates = (self.rate, self.deviation, self.polarise)
        if not (self.rate > 0 and all(0 <= value < math.inf for value in rates)):
            raise ConfigError(
                "soco needs finite rate > 0, deviation >= 0 and polarise >= 0; got "
                f"{self.rate:g}, {self.deviation:g} and {self.polarise:g}"
            )
        if not 0 < self.threshold < 1 or self.gate_from not in (1, 3):
            raise ConfigError(
                "soco needs a threshold in (0, 1) and gate_from of 1 or 3; got "
                f"{self.threshold:g} and {self.gate_from}"
            )

    @property
    def steps(self) -> int:
        """Steps of all phases."""
        return self.phase1 + self.phase2 + self.phase3

    @property
    def reads_teacher(self) -> bool:
        """KL to the dense model needs its logits."""
        return True

    @property
    def biases(self) -> bool:
        """The deviation becomes one."""
        return self.deviation > 0

    def check(self, layers: Sequence[LayerRef], kept: float, samples: int) -> None:
        """Refuses a budget below one component of every layer, and too little text.

        Raises:
            BudgetError, ConfigError: It cannot be.
        """
        check_one_component_each(self.charged(layers), kept, biases=self.biases)
        check_samples(samples)

    def charged(self, layers: Sequence[LayerRef]) -> list[LayerRef]:
        """The layers with what their components cost as they will be stored."""
        return [replace(layer, form=self.form) for layer in layers]

    def learn(self, given: Assignment) -> Learned:
        """Trains scores and deviation, then cuts at the exact budget.

        Raises:
            NumericsError: The loss is not finite; names the step and the layer.
        """
        run = _Run(self, given)
        return run.finish(train_whole(given, self.steps, run.step, run.state))


class _Run:
    """One training: its parameters, and what a step does."""

    def __init__(self, settings: LearnSpectrum, given: Assignment) -> None:
        assert given.teacher is not None
        model, layout, training = given.model, given.layout, given.training
        self.settings, self.model, self.layout = settings, model, layout
        self.halves = Halves(model)
        self.kept, self.teacher, self.training = given.kept, given.teacher, training
        found = {layer.name: given.atoms(layer) for layer in layout.layers}
        layers = settings.charged(layout.layers)
        spectra = Spectra.of(layers, [found[x.name].energy for x in layers])
        self.gated = GatedSpectra(
            spectra,
            settings.map,
            settings.threshold,
            settings.order,
            settings.deviation > 0,
            training.device,
        )
        install(model, spectra, found, self.gated.effective, self.gated.deviation)
        self.parameters = [self.gated.raw] + ([self.gated.shift] if self.gated.extras else [])
        self.rates = [settings.rate, settings.deviation]
        self.optimizer = torch.optim.AdamW(
            [{"params": [parameter]} for parameter in self.parameters],
            weight_decay=0.0,
            betas=(0.9, 0.95),
        )
        self.pressure = torch.tensor(FIRST_PRESSURE, dtype=torch.float64)
        gated = self.gated
        decided = {"dense": gated.dense, "stays": gated.stays, "settled": gated.settled}
        remembered = {**decided, "pressure": self.pressure}
        parameters = {"raw": self.gated.raw, "shift": self.gated.shift}
        self.state = TrainState(parameters | remembered, self.optimizer)

    def phase(self, step: int) -> int:
        """1, 2 or 3."""
        first = self.settings.phase1
        return 1 + (step >= first) + (step >= first + self.settings.phase2)

    def step(self, step: int) -> tuple[dict[str, float], str]:
        """One step of the optimiser."""
        phase, gated, training = self.phase(step), self.gated, self.training
        settings = self.settings
        self._set(step, phase)
        windows, tokens = next_batch(step, training)
        with torch.enable_grad():
            taught = self.teacher.at(windows, training.device)
            hidden = self.halves.hidden(tokens).flatten(0, 1)
            kl = self.halves.total(hidden, taught.divergence) / len(hidden)
            require_finite(kl, "soco", step, self.model, self.layout, tokens)
            scores = gated.all_scores()
            alive = gated.alive(scores)
            now = gated.spectra.kept(alive, gated.extras)
            gate = gated.gate(scores)
            push = self._push(now, alive, gate)
            loss = kl
            if phase == 3 and not gated.settled:
                weight = settings.polarise * float(kl.detach()) * self._done(step)
                below = scores * (scores < settings.threshold)
                loss = loss + weight * (gate * (1 - gate) + below).mean()
            descend(loss, self.optimizer, self.parameters, self.model.dtype)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        before = gated.raw.detach().clone()
        self.optimizer.step()
        if push is not None:
            self._press(before, push)
        self._adapt(phase, now)
        value = float(kl.detach())
        measured = {"kl": value, "kept": now, "phase": phase, **_described(scores, gate)}
        if gated.settled:
            measured["undecided"] = 0.0
        return measured, f"phase {phase} KL {value:.3f} kept {now:.3f}"

    def _adapt(self, phase: int, now: float) -> None:
        """The pressure grows while too much is stored, and eases while too little is."""
        over = now > self.kept
        if (phase == 1 and over) or now > self.kept + NEAR:
            self.pressure.mul_(RAMP ** (1 / self.settings.phase1)).clamp_(max=MOST_PRESSURE)
        elif phase > 1:
            self.pressure.mul_(UP if over else DOWN)

    def _push(self, now: float, alive: Tensor, gate: Tensor) -> Tensor | None:
        """The weighted gradient of the share by the raw scores, (components,).

        None at or below the target, and once what stays is settled.
        """
        over = now - self.kept
        if over <= 0 or self.gated.settled:
            return None
        share = (self.gated.spectra.prices(alive).to(gate) * gate).sum()
        (gradient,) = torch.autograd.grad(share, self.gated.raw, retain_graph=True)
        return float(self.pressure) * min(1.0, over / NEAR) * gradient

    @torch.no_grad()
    def _press(self, before: Tensor, push: Tensor) -> None:
        """Adds the pressure to the step that Adam has made of the KL alone.

        It is measured in the root of the KL's second moment and never enters it, so that the KL's
        steps afterwards are as large as before; so weighed a score falls where the weighted share
        falls faster than the KL rises, and by no more than the learning rate.
        """
        group, moments = self.optimizer.param_groups[0], self.optimizer.state[self.gated.raw]
        seen = 1 - group["betas"][1] ** float(moments["step"])
        unit = (moments["exp_avg_sq"] / seen).sqrt() + group["eps"]
        steps = (before - self.gated.raw) / group["lr"] + push / unit
        self.gated.raw.copy_(before - group["lr"] * steps.clamp_(-1, 1))

    def _done(self, step: int) -> float:
        """How far phase 3 is, in [0, 1); negative before it."""
        begin = self.settings.phase1 + self.settings.phase2
        return (step - begin) / max(1, self.settings.phase3)

    def _set(self, step: int, phase: int) -> None:
        """What follows from the step alone: the gate and the learning rates."""
        gated, settings = self.gated, self.settings
        gated.open = settings.gate_from == 3 and phase < 3
        if phase == 3 and not gated.settled and self._done(step) >= SETTLING:
            gated.settle(self.kept)
        falling = 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        rates = zip(self.optimizer.param_groups, self.rates, strict=False)
        for group, rate in rates:
            group["lr"] = rate * (LAST_RATE + (1 - LAST_RATE) * falling)

    @torch.no_grad()
    def finish(self, curves: dict[str, Tensor]) -> Learned:
        """The exact cut, and what it found."""
        require_finite_parameters(self.parameters, "soco")
        gated = self.gated
        if not gated.settled:
            gated.settle(self.kept)
        spectra, places, scores = gated.spectra, gated.places(), gated.all_scores()
        chosen = choose(spectra, places, scores, gated.shift if gated.extras else None)
        scales = [c.scale.max() for c in chosen.values() if c.scale is not None and len(c.scale)]
        report = {
            "overlap with sigma order": overlap(places),
            "largest score": float(max(scales, default=torch.tensor(1.0))),
            "dense layers": float(sum(place is None for place in places)),
        }
        return Learned(chosen, curves, report)


def _described(scores: Tensor, gate: Tensor) -> dict[str, float]:
    """Scores of one step as numbers for the curves."""
    with torch.no_grad():
        levels = torch.tensor([0.1, 0.5, 0.9], device=scores.device)
        low, middle, high = _sample(scores).quantile(levels).tolist()
        undecided = ((gate > 0.1) & (gate < 0.9)).float().mean()
    quantiles = {"score_10": low, "score_50": middle, "score_90": high}
    return {**quantiles, "undecided": float(undecided)}


def _sample(scores: Tensor, most: int = 1 << 20) -> Tensor:
    """Evenly spaced ones of many: quantiles of more than 16 million torch refuses."""
    return scores[:: max(1, len(scores) // most)]
