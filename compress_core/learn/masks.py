"""What CAP's policies have in common: items and their first ranking, windows, the cut, the report.

A training has two phases. Where the first ranking is by gradients, their windows come first; then a
policy may move what that ranking says. Either may be empty.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Protocol

import torch
from torch import Tensor

from compress_core.allocate.base import check_one_component_each
from compress_core.decompose import LowRank
from compress_core.errors import ConfigError
from compress_core.learn.base import Assignment, Learned, pick
from compress_core.learn.gains import Gains
from compress_core.learn.items import Items
from compress_core.learn.loop import TrainState, require_finite, run_steps
from compress_core.learn.worth import (
    GRADIENTS,
    METHOD,
    Init,
    hold_back,
    mean_loss,
    mean_squares,
    worths,
)
from compress_core.refine.turns import Refit
from compress_core.sparse import Sparse
from compress_core.types import LayerRef

LEAST_WINDOWS = 2  # one to learn from and one to report on


class MaskPolicy:
    """What CAP's policies have in common as learners."""

    init: Init
    updates: int

    @property
    def steps(self) -> int:
        """Of both phases, at most."""
        return self.updates + (GRADIENTS if self.init == "gradient" else 0)

    @property
    def reads_teacher(self) -> bool:
        """The loss is that of the text: KL has no gradient at the dense model."""
        return False

    @property
    def biases(self) -> bool:
        """It has none."""
        return False

    def check(self, layers: Sequence[LayerRef], kept: float, samples: int) -> None:
        """Refuses a budget below one component of every layer, and too little text.

        Raises:
            BudgetError, ConfigError: It cannot be.
        """
        check_one_component_each(layers, kept)
        if samples < LEAST_WINDOWS:
            raise ConfigError(
                "cap learns from some calibration windows and reports on others: give --samples of "
                f"at least {LEAST_WINDOWS}, not {samples}"
            )


class Policy(Protocol):
    """The second phase."""

    def begin(self) -> Mapping[str, Tensor]:
        """What it changes from step to step, made from what items are worth."""
        ...

    def step(self, number: int) -> tuple[Mapping[str, float], str]:
        """One step, counted from 0, as :data:`compress_core.learn.loop.Step`."""
        ...


class MaskTraining:
    """A training on masks: what it is given, put in order.

    Args:
        given: What a learner is given.
        init: What items are worth at first.
        anchored: How weights are made of items; see :class:`Items`.
        refit: What is fitted to the weights of a cut before its loss is measured; None for nothing.

    Attributes:
        items: What can be kept.
        worth: Per stored number, float32 (items,); known where the second phase begins.
        windows: To learn from.
        held: To report on.
    """

    def __init__(
        self,
        given: Assignment,
        init: Init,
        *,
        anchored: bool = False,
        refit: Refit | None = None,
    ) -> None:
        self.model, self.layout, self.training = given.model, given.layout, given.training
        self.items = Items(given.model, given.layout, given.atoms, given.kept, anchored)
        self.windows, self.held = hold_back(given.training.windows)
        self._refit, self._squares = refit, {}
        if refit is not None and refit.scaled:
            self._squares = mean_squares(
                given.model, given.layout, self.windows, given.training.device
            )
        self.first = min(GRADIENTS, len(self.windows)) if init == "gradient" else 0
        self.worth = (
            torch.zeros(len(self.items))
            if init == "gradient"
            else worths(self.items, given.layout, init, self.windows, given.training.device)
        )

    def loss(self, windows: Tensor, step: int) -> Tensor:
        """Mean loss of the model as it stands, float64.

        Raises:
            NumericsError: It is not finite.
        """
        found = mean_loss(self.model, windows, self.training.device)
        ids = windows[:1].to(self.training.device)
        require_finite(found, METHOD, step, self.model, self.layout, ids)
        return found

    def loss_of(self, cut: tuple[Tensor, list[bool]], step: int) -> float:
        """Loss on windows that nothing learns from, of the model that a cut makes, refitted."""
        items = self.items
        items.put_cut(*cut)
        if self._refit is not None:
            chosen = items.chosen(*cut)
            for number, layer in enumerate(items.layers):
                factors = pick(items.atoms(layer), chosen[layer.name])
                if factors is not None:
                    self._fit(number, factors)
        return float(self.loss(self.held, step))

    @torch.no_grad()
    def _fit(self, number: int, factors: LowRank) -> None:
        """Overwrites a layer's weight by what its factors and entries are fitted to."""
        assert self._refit is not None
        layer, dense = self.items.layers[number], self.items.dense(number).to(torch.float64)
        sparse = factors.sparse and Sparse(
            factors.sparse.mask.to(dense.device), factors.sparse.values.to(dense)
        )
        start = LowRank(factors.u.to(dense), factors.v.to(dense), sparse=sparse)
        squares = self._squares.get(layer.tap)
        d = torch.ones_like(dense[0]) if squares is None else squares.sqrt().to(dense)
        self.items.weight(layer).copy_(self._refit.solve(dense, start, d).dense())

    def run(self, policy: Policy | None = None, updates: int = 0) -> dict[str, Tensor]:
        """Curves of both phases; weights that they change are put back."""
        state = _State({"worth": self.worth} if self.first else {})
        gains = Gains(self.model, self.layout, self.items, self.worth)
        begun = False
        with self.items.restored(), ExitStack() as gradients:

            def step(number: int) -> tuple[Mapping[str, float], str]:
                nonlocal begun
                if number < self.first:
                    return gains.step(number, self.windows, self.training, gradients)
                gradients.close()
                assert policy is not None
                if not begun:
                    state.add(policy.begin())
                    begun = True
                return policy.step(number - self.first)

            return run_steps(self.first + updates, step, state, self.training)

    def finish(
        self,
        curves: dict[str, Tensor],
        score: Callable[[], Tensor] | None = None,
        *,
        first: Tensor | None = None,
        better: bool = True,
        losses: tuple[float, float] | None = None,
    ) -> Learned:
        """Cuts by what items are worth and by a score, and compares the two.

        Args:
            curves: What was measured on the way.
            score: Makes what was learned: larger for what is better kept, (items,); None for
                nothing learned.
            first: What items are worth where training begins; None for what they were at first.
            better: Whether the better of both on held-out windows comes out, or the score's.
            losses: On those windows, of the first cut and of the score's, where they are known.
        """
        items, steps = self.items, max((len(curve) for curve in curves.values()), default=0)
        report = {"loss dense": float(self.loss(self.held, steps))}
        start = items.cut(self.worth if first is None else first)
        last = start if score is None else items.cut(score())
        if losses is None:
            with items.restored():
                before = trained = self.loss_of(start, steps)
                if last is not start:
                    trained = self.loss_of(last, steps)
        else:
            before, trained = losses
        if better and trained > before:
            last = start
        report["loss before"], report["loss trained"] = before, trained
        report["loss after"] = before if last is start else trained
        chosen = items.chosen(*last)
        stored = sum(chosen[layer.name].cost(layer) for layer in items.layers)
        report["kept"] = stored / items.total
        report["changed by training"] = float((start[0] != last[0]).sum()) / max(len(items), 1)
        report["dense layers"] = float(sum(last[1]))
        entries = sum(int(x.entries.sum()) for x in chosen.values() if x.entries is not None)
        report["entries, part of what is kept"] = entries / max(stored, 1)
        return Learned(chosen, curves, report)


class _State(TrainState):
    """A state of which some is made when the second phase begins."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self._saved: Mapping[str, Tensor] = {}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """As :meth:`TrainState.load`; what is not there yet waits for :meth:`add`."""
        super().load(saved)
        self._saved = saved

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes tensors in, as they were saved if they were."""
        for name, tensor in tensors.items():
            if f"state.{name}" in self._saved:
                tensor.copy_(self._saved[f"state.{name}"])
            self.tensors[name] = tensor
        self._saved = {}


def generator_of(seed: int, *place: int) -> torch.Generator:
    """A generator for one draw, by seed and by where in the training it is."""
    number = seed
    for part in place:
        number = (number * 1_000_003 + part + 1) % (1 << 62)
    return torch.Generator().manual_seed(number)
