"""What CAP's three policies have in common: items, windows, the cut, and the report."""

from collections.abc import Sequence

import torch
from torch import Tensor

from compress_core.allocate.base import check_one_component_each
from compress_core.errors import ConfigError
from compress_core.learn.base import Assignment, Learned
from compress_core.learn.items import Items
from compress_core.learn.keep import ranking
from compress_core.learn.loop import require_finite
from compress_core.learn.worth import Init, hold_back, mean_loss, worths
from compress_core.types import LayerRef

METHOD = "cap"
LEAST_WINDOWS = 2  # one to learn from and one to report on


class MaskPolicy:
    """What CAP's policies have in common as learners."""

    @property
    def reads_teacher(self) -> bool:
        """The loss is that of the text: KL has no gradient at the dense model."""
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


class MaskTraining:
    """A training on masks: what it is given, put in order.

    Args:
        given: What a learner is given.
        init: What items are worth at first.

    Attributes:
        items: What can be kept.
        worth: Per stored number, before anything is trained, float32 (items,).
        windows: To learn from.
        held: To report on.
    """

    def __init__(self, given: Assignment, init: Init) -> None:
        self.model, self.layout, self.training = given.model, given.layout, given.training
        self.items = Items(given.model, given.layout, given.atoms, given.kept)
        self.windows, self.held = hold_back(given.training.windows)
        self.worth = worths(self.items, given.layout, init, self.windows, given.training.device)

    def loss(self, windows: Tensor, step: int) -> Tensor:
        """Mean loss of the model as it stands, float64.

        Raises:
            NumericsError: It is not finite.
        """
        found = mean_loss(self.model, windows, self.training.device)
        ids = windows[:1].to(self.training.device)
        require_finite(found, METHOD, step, self.model, self.layout, ids)
        return found

    def finish(self, score: Tensor, curves: dict[str, Tensor]) -> Learned:
        """Cuts by score, and compares that with the cut by what items were worth at first.

        Args:
            score: Larger for what is better kept, (items,); equal scores go by worth.
            curves: What was measured on the way.
        """
        items, steps = self.items, max((len(curve) for curve in curves.values()), default=0)
        report = {"loss dense": float(self.loss(self.held, steps))}
        first = items.cut(ranking(self.worth, self.worth))
        last = items.cut(ranking(score, self.worth))
        with items.restored():
            for name, cut in (("loss before", first), ("loss after", last)):
                items.put_cut(*cut)
                report[name] = float(self.loss(self.held, steps))
        chosen = items.chosen(*last)
        stored = sum(chosen[layer.name].cost(layer) for layer in items.layers)
        report["kept"] = stored / items.total
        report["changed by training"] = float((first[0] != last[0]).double().mean())
        report["dense layers"] = float(sum(last[1]))
        entries = sum(int(x.entries.sum()) for x in chosen.values() if x.entries is not None)
        report["entries, part of what is kept"] = entries / max(stored, 1)
        return Learned(chosen, curves, report)


def generator_of(seed: int, *place: int) -> torch.Generator:
    """A generator for one draw, by seed and by where in the training it is."""
    number = seed
    for part in place:
        number = (number * 1_000_003 + part + 1) % (1 << 62)
    return torch.Generator().manual_seed(number)
