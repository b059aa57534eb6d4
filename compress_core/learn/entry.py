"""CAP's stage 2 in a reading that learns: probabilities of single items by policy gradient.

As printed (see ``bernoulli``) first probabilities are so soft that a drawn model says nothing about
the cut one, the divisor s (1 − s) throws rarely drawn items to 0 or 1, and the projection takes
θ · price, so that components pay for the entries' noise. Here, with the ancestor's divisor and
uniform shift:

    s = sigmoid((log worth − log w₀) / T), w₀ the worth at which the cut by worth ends,
    g = Σ_k (J_k − mean of the others' J) (m_k − s) / √(s (1 − s)) / draws,
    s ← clip(s − η g − θ),  θ such that Σ price · s is the budget.

What entries are worth beside components, which the paper leaves open too, is doubled as long as
that lowers the loss of the refitted cut on windows that nothing learns from.

T is small, so that only items near w₀ are open at all: those within ``REACH`` · T of it. Everything
else is settled, and a draw changes the cut's weights by the items that differ from it, which is
cheap. Draws come in antithetic pairs on one batch. At every third of the training the cut by s is
measured on windows that nothing learns from; the best of those cuts and the first one comes out.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from compress_core.errors import ConfigError
from compress_core.learn.base import Assignment, Learned
from compress_core.learn.group import leave_one_out
from compress_core.learn.items import build, where
from compress_core.learn.keep import Prices, shift
from compress_core.learn.loop import batch_of
from compress_core.learn.masks import MaskPolicy, MaskTraining, generator_of
from compress_core.learn.worth import Init
from compress_core.refine.turns import refit_to_weight

REACH = 7.0  # times T in log worth: further away s is within 0.001 of 0 or 1
PASSES = 3  # over the windows
MOST = 192  # steps
CHECKS = 3  # of the cut on held-out windows
TURNS = 10  # of a refit before a cut is measured
DOUBLINGS = 8  # of what entries are worth, at most
EPSILON = 1e-6


@dataclass(frozen=True)
class EntryPolicy(MaskPolicy):
    """A probability for every item near the cut's threshold.

    Attributes:
        updates: Steps of policy gradient, at most; they end after three passes over the windows.
        batch: Windows in a step; each draw sees all of them.
        draws: In a step, an even number.
        eta: Step size η.
        temperature: T, in natural logarithms of worth.
        init: What items are worth at first.
        refit: How the method refits afterwards; "none" for not at all. Where it does, a drawn
            weight is the dense one wherever an entry stays, which is nearer to what comes out, and
            a cut is refitted before it is measured on held-out windows ("anchor" and "turns").
        scaled: Whether inputs count by their scale in that.
    """

    updates: int = MOST
    batch: int = 1
    draws: int = 2
    eta: float = 1.5
    temperature: float = 0.05
    init: Init = "energy"
    refit: str = "none"
    scaled: bool = False

    def __post_init__(self) -> None:
        positive = all(0 < value < math.inf for value in (self.eta, self.temperature))
        if min(self.updates, self.batch) < 1 or not positive:
            raise ConfigError(
                "cap needs steps, a temperature and a finite eta above 0, got "
                f"{self.updates}, {self.temperature:g} and {self.eta:g}"
            )
        if self.draws < 2 or self.draws % 2:
            raise ConfigError(f"cap's draws come in pairs, got {self.draws}")

    def learn(self, given: Assignment) -> Learned:
        """See :class:`compress_core.learn.base.Learner`; never worse than where it began."""
        refit = refit_to_weight(self.refit, scaled=self.scaled, turns=TURNS)
        run = MaskTraining(given, self.init, anchored=self.refit != "none", refit=refit)
        steps = min(self.updates, -(-PASSES * len(run.windows) // self.batch))
        policy = _Policy(self, run, steps)
        curves = run.run(policy, steps)
        losses = policy.checks.nan_to_num(nan=torch.inf)
        found = float(losses[0]), float(losses[1:].min())
        score = policy.score(policy.best)
        return run.finish(curves, lambda: score, first=policy.worth, losses=found)


@dataclass(frozen=True)
class _Near:
    """What of one layer is open, and what a draw needs of it.

    Attributes:
        components: Their numbers among the layer's, (k,).
        entries: Theirs, (n,).
        ut: Of the open components, (k, out).
        v: (k, in).
        places: Of the open entries in the weight read row by row, (n,).
        values: Theirs, (n,).
        kept: What the first cut has of them: bool (k + n,).
        base: The weight that the first cut makes, or the low-rank part of it, (out, in).
        fixed: Where entries of the first cut are, (out, in) bool, if those are anchored.
    """

    components: Tensor
    entries: Tensor
    ut: Tensor
    v: Tensor
    places: Tensor
    values: Tensor
    kept: Tensor
    base: Tensor
    fixed: Tensor | None

    def weight(self, mask: Tensor, dense: Callable[[], Tensor]) -> Tensor:
        """The weight with the open items of ``mask`` (k + n,), bool.

        Args:
            mask: What of the open items stays.
            dense: The dense weight, which anchored entries are taken from.
        """
        change = (mask.to(torch.float32) - self.kept.to(torch.float32)).to(self.base.device)
        of_components, of_entries = change.split([len(self.components), len(self.entries)])
        rows = of_components.nonzero().flatten()
        found = self.base.clone()
        if len(rows):
            found += (self.ut[rows] * of_components[rows, None]).T @ self.v[rows]
        moved = of_entries.nonzero().flatten()
        places = self.places[moved].long()
        if self.fixed is not None:
            fixed = self.fixed.clone()
            fixed.view(-1)[places] = of_entries[moved] > 0
            return torch.where(fixed, dense().to(found.dtype), found)
        change = self.values[moved] * of_entries[moved]
        found.view(-1).index_add_(0, places, change.to(found.dtype))
        return found


class _Policy:
    """Probabilities of what is open."""

    def __init__(self, options: EntryPolicy, run: MaskTraining, steps: int) -> None:
        self.options, self.run, self.steps = options, run, steps
        self.near: list[_Near | None] = []
        self.worth = self.s = self.best = torch.zeros(0)
        self.checks = torch.full((1 + CHECKS,), torch.nan, dtype=torch.float64)
        self.level = -math.inf
        self.prices, self.room = Prices([]), 0.0

    def begin(self) -> Mapping[str, Tensor]:
        """Cuts by worth, and opens what is near its threshold."""
        items = self.run.items
        self.worth, self.checks[0] = self._balanced()
        worth = self.worth
        mask, dense = items.cut(worth)
        items.put_cut(mask, dense)
        self.level = self._level(mask, dense)
        logits, runs, room = [], [], float(items.budget)
        pairs = zip(items.parts(worth), items.parts(mask), strict=True)
        for number, (worths, masks) in enumerate(pairs):
            layer = items.layers[number]
            near = None if dense[number] else self._open(number, worths, masks)
            self.near.append(near)
            closed = layer.dense_cost if dense[number] else 0
            if near is not None:
                sizes = [len(near.components), len(near.entries)]
                open_ = [int(part.sum()) for part in near.kept.split(sizes)]
                closed = sum(
                    (int(part.sum()) - count) * price
                    for part, count, price in zip(masks, open_, (layer.atom_cost, 1), strict=True)
                )
                for part, index in zip(worths, (near.components, near.entries), strict=True):
                    logits.append(
                        (part[index.long()].log() - self.level) / self.options.temperature
                    )
                runs += list(zip(sizes, (layer.atom_cost, 1), strict=True))
            room -= closed
        self.prices, self.room = Prices(runs), room
        self.s = torch.cat(logits).sigmoid() if logits else torch.zeros(0)
        shift(self.s, self.prices, room)
        self.best = self.s.clone()
        return {"probabilities": self.s, "best": self.best, "checks": self.checks}

    def _balanced(self) -> tuple[Tensor, float]:
        """What items are worth, entries by the doubling up to which the loss falls, and that."""
        items, best, least = self.run.items, self.run.worth, math.inf
        for doubled in range(DOUBLINGS + 1):
            worth = self.run.worth.clone()
            for _, entries in items.parts(worth):
                entries.mul_(2.0**doubled)
            loss = self.run.loss_of(items.cut(worth), 0)
            if not loss < least:
                break
            best, least = worth, loss
        return best, least

    def _level(self, mask: Tensor, dense: list[bool]) -> float:
        """Log worth of the best item that the cut leaves out; −inf where it leaves none."""
        items = self.run.items
        pairs = zip(items.whole(self.worth), items.whole(mask), dense, strict=True)
        out = [worth[~kept] for worth, kept, whole in pairs if not whole]
        found = [float(part.max()) for part in out if len(part)]
        return math.log(max(found)) if found and max(found) > 0 else -math.inf

    def _open(self, number: int, worths: tuple[Tensor, ...], masks: tuple[Tensor, ...]) -> _Near:
        """The items of a layer near the threshold; its best one stays what it is."""
        items, layer = self.run.items, self.run.items.layers[number]
        reach = REACH * self.options.temperature
        best = (
            max(float(part.max()) for part in worths if len(part)) if any(map(len, worths)) else 0
        )
        index = []
        for part in worths:
            away = part.log() - self.level
            index.append(((away.abs() <= reach) & (part < best)).nonzero().flatten())
        atoms, weight = items.atoms(layer), items.weight(layer)
        rows, entries = index
        places = torch.zeros(0, dtype=torch.int64)
        values = torch.zeros(0)
        if atoms.sparse is not None:
            places = atoms.sparse.mask.flatten().nonzero().flatten()[entries]
            values = atoms.sparse.values[entries]
        kept = torch.cat([part[found] for part, found in zip(masks, index, strict=True)])
        to = weight.device
        base, fixed = weight.clone(memory_format=torch.contiguous_format), None
        if items.anchored and atoms.sparse is not None:
            base = build(atoms, masks[0], torch.zeros_like(masks[1]), to)
            fixed = where(atoms.sparse, masks[1]).to(to)
        return _Near(
            rows.to(torch.int32),
            entries.to(torch.int32),
            atoms.ut[rows].to(to),
            atoms.v[rows].to(to),
            places.to(to, torch.int32),
            values.to(to),
            kept,
            base,
            fixed,
        )

    def step(self, number: int) -> tuple[Mapping[str, float], str]:
        """One step of policy gradient."""
        options, run = self.options, self.run
        picks = batch_of(number, len(run.windows), options.batch, run.training.seed)
        masks = self._draws(number)
        losses = torch.stack([self._loss(mask, run.windows[picks], number) for mask in masks])
        slope = torch.zeros_like(self.s)
        for mask, advantage in zip(masks, leave_one_out(losses).tolist(), strict=True):
            slope.add_(mask.to(self.s) - self.s, alpha=advantage / len(masks))
        root = (self.s * (1 - self.s)).sqrt_().add_(EPSILON)
        self.s.sub_(slope.div_(root), alpha=options.eta)
        shift(self.s, self.prices, self.room)
        third = -(-self.steps // CHECKS)
        if (number + 1) % third == 0 or number + 1 == self.steps:
            self._check(1 + number // third, number)
        loss = float(losses.mean())
        return {"loss": loss}, f"loss {loss:.3f}"

    def _draws(self, number: int) -> list[Tensor]:
        """Antithetic pairs of bool masks over what is open."""
        generator = generator_of(self.run.training.seed, number)
        found = []
        for _ in range(self.options.draws // 2):
            uniform = torch.rand(len(self.s), generator=generator)
            found += [uniform < self.s, uniform > 1 - self.s]
        return found

    def _loss(self, mask: Tensor, windows: Tensor, step: int) -> Tensor:
        """Mean loss of the model that a mask makes."""
        items, start = self.run.items, 0
        with torch.no_grad():
            for number, (layer, near) in enumerate(zip(items.layers, self.near, strict=True)):
                if near is not None:
                    end = start + len(near.kept)
                    dense = partial(items.dense, number)
                    items.weight(layer).copy_(near.weight(mask[start:end], dense))
                    start = end
        return self.run.loss(windows, step)

    def _check(self, place: int, number: int) -> None:
        """Remembers the probabilities if their cut is the best of the checks so far."""
        items = self.run.items
        loss = self.run.loss_of(items.cut(self.score(self.s)), number)
        if not bool((self.checks[1:] <= loss).any()):
            self.best.copy_(self.s)
        self.checks[place] = loss

    def score(self, s: Tensor) -> Tensor:
        """Of every item (items,): worth, and among what is open the order of ``s``."""
        found, start = self.worth.clone(), 0
        reach = REACH * self.options.temperature
        for parts, near in zip(self.run.items.parts(found), self.near, strict=True):
            if near is not None:
                for part, index in zip(parts, (near.components, near.entries), strict=True):
                    end = start + len(index)
                    part[index.long()] = (self.level + reach * (2 * s[start:end] - 1)).exp()
                    start = end
        return found
