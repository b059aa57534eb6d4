"""How a recovery goes: its settings, how long each part of it takes, and which η is tried next."""

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from compress_core.errors import ConfigError
from compress_core.recover.windows import held_back

How = Literal["lora", "factors"]
MOST_HELD_BACK = 0.5
LADDER = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # η that are tried
FIRST = 4  # place in the ladder where the search begins
TRIAL = 0.04  # share of a side's steps that a trial takes
WARM_UP = 0.05  # share of a side's steps
END = 0.02  # share of η at a side's end
CHECKS = 40  # times that the held-back loss is measured per side


@dataclass(frozen=True)
class Recovery:
    """How a compressed model is trained on.

    Attributes:
        how: "factors": all that compressed layers store; "lora": updates of low rank, of what acts
            on the layers' outputs first and of the in-factors then, merged into what is stored.
        steps: Of the training, beside those in which η is looked for.
        held_back: Share of the calibration windows that is watched and not trained on.
        text: Weight of the text's own next tokens in the loss; the dense model has the rest.
        seed: Of what is held back, the order of windows, and the updates' beginnings.
        batch: Windows in a step.
        rank: Of the updates of "lora".
    """

    how: How
    steps: int = 400
    held_back: float = 0.125
    text: float = 0.2
    seed: int = 0
    batch: int = 4
    rank: int = 8

    def check(self, samples: int) -> None:
        """Refuses settings out of range, and too few calibration windows.

        Raises:
            ConfigError: They are.
        """
        if self.steps < 1:
            raise ConfigError(f"recovery takes at least 1 step, got {self.steps}")
        if not 0 < self.held_back <= MOST_HELD_BACK:
            raise ConfigError(
                f"the share of windows that recovery holds back is above 0 and at most "
                f"{MOST_HELD_BACK:g}, got {self.held_back:g}"
            )
        if not 0 <= self.text <= 1:
            raise ConfigError(
                f"the weight of the text in recovery's loss is in [0, 1], got {self.text:g}"
            )
        held_back(samples, self.held_back)

    @property
    def sides(self) -> int:
        """1 where all is trained together, 2 where in-factors are trained after the others."""
        return 2 if self.how == "lora" else 1

    @property
    def proper(self) -> int:
        """Steps of the training proper, per side."""
        return -(-self.steps // self.sides)

    @property
    def trial(self) -> int:
        """Steps of one trial of η."""
        return max(2, round(TRIAL * self.proper))

    @property
    def search(self) -> int:
        """Steps of all trials of a side, if none is spared."""
        return self.trial * len(LADDER)

    @property
    def all_steps(self) -> int:
        """Steps of everything, at most."""
        return self.sides * (self.search + self.proper)

    def eta_share(self, step: int) -> float:
        """Share of η in a step of the training proper: it warms up, and falls with a cosine."""
        warm = min(1.0, (step + 1) / max(1.0, WARM_UP * self.proper))
        falling = 0.5 * (1 + math.cos(math.pi * step / self.proper))
        return warm * (END + (1 - END) * falling)

    @property
    def _every(self) -> int:
        """Steps of the training proper between two checks."""
        return max(1, self.proper // CHECKS)

    def checks(self, step: int) -> bool:
        """Whether the held-back loss is measured after a step of the training proper."""
        return (step + 1) % self._every == 0 or step + 1 == self.proper

    def watched(self, samples: int) -> int:
        """Windows that are run to measure the held-back loss, of all such measures, at most.

        Args:
            samples: Calibration windows.
        """
        measures = 1 + self.sides * (len(LADDER) + -(-self.proper // self._every))
        return measures * held_back(samples, self.held_back)


def next_trial(losses: Tensor) -> int | None:
    """Which place of the ladder is tried next: uphill from the first; None at the top.

    Args:
        losses: Held-back loss after each trial, (ladder,), not-a-number for those not tried.
    """
    tried = ~losses.isnan()
    if not bool(tried.any()):
        return FIRST
    best = best_trial(losses)
    beside = (best + 1, best - 1)
    return next((i for i in beside if 0 <= i < len(losses) and not tried[i]), None)


def best_trial(losses: Tensor) -> int:
    """Which place of the ladder had the least held-back loss."""
    return int(losses.nan_to_num(nan=math.inf).argmin())
