"""Equal slope: components are bought where one number stored takes away most divergence.

A layer's predicted divergence at rank r is s · loss(r), with loss the output error left and s its
measured sensitivity: the model's KL when that layer alone is cut hard, per unit of output error.
In whatever metric that error is, s is of the same; with ``metric=two_sided``, whose loss is twice a
predicted KL, s corrects that prediction, and is ½ where it holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from compress_core.allocate.base import (
    Evidence,
    Probe,
    budget_of,
    check_one_component_each,
    share_at,
)
from compress_core.allocate.buying import buy, curve_of
from compress_core.errors import ConfigError
from compress_core.types import LayerRef, Share


@dataclass(frozen=True)
class Hull:
    """Components where one number stored takes away most divergence, at an equal slope.

    Greedy on the lower convex hull of every layer's (cost, predicted divergence) curve. The curve
    ends with the dense weight, which costs out · in and loses nothing; factors just below that cost
    lose much, so only the hull makes greedy buying optimal. Relative output energy in place of s
    loses to uniform ranks on small models; a measured s does not.

    The sensitivity is measured on the otherwise dense model, so one table serves every budget.

    Attributes:
        probe_share: Share that a layer is cut to when its sensitivity is measured, in (0, 1).
        probe_windows: Calibration windows for that.
    """

    probe_share: float = 0.1
    probe_windows: int = 32
    reads: ClassVar[frozenset[str]] = frozenset({"losses", "divergence"})

    def __post_init__(self) -> None:
        if not 0 < self.probe_share < 1:
            raise ConfigError(f"probe_share is in (0, 1), got {self.probe_share:g}")
        check_windows(self.probe_windows)

    def probe(self, kept: float) -> Probe | None:
        """One cut per layer, all others dense."""
        return Probe(None, (self.probe_share,), self.probe_windows)

    def check(self, layers: Sequence[LayerRef], kept: float) -> None:
        """Refuses a budget that cannot hold one component of every layer.

        Raises:
            BudgetError: It cannot.
        """
        check_one_component_each(layers, kept)

    def allocate(
        self, layers: Sequence[LayerRef], kept: float, evidence: Evidence
    ) -> dict[str, Share]:
        """Buys the steepest segments of all hulls that still fit."""
        curves = {}
        for layer in layers:
            (divergence,) = evidence.divergence[layer.name]
            loss = evidence.losses[layer.name]
            weight = sensitivity(layer, loss, divergence, self.probe_share)
            curves[layer.name] = list(curve_of(layer, partial(_divergence, loss, weight)))
        return buy(layers, budget_of(layers, kept), curves)


def check_windows(windows: int) -> None:
    """Refuses a probe without windows.

    Raises:
        ConfigError: There are none.
    """
    if windows < 1:
        raise ConfigError(f"probe_windows must be at least 1, got {windows}")


def sensitivity(layer: LayerRef, loss: Tensor, divergence: float, share: float) -> float:
    """KL per unit of output error at the probed share; 0 where the cut loses nothing."""
    rank = share_at(layer, share).rank
    if rank is None or not float(loss[rank]) > 0:
        return 0.0
    return max(0.0, divergence) / float(loss[rank])


def _divergence(loss: Tensor, weight: float, rank: int) -> float:
    return weight * float(loss[rank])
