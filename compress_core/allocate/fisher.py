"""Equal slope by one backward pass: divergences predicted from gradients, not measured.

At rank r a layer's error is E = W − u v, and the model's KL is predicted as ½ tr(G E H Eᵀ), with H
the second moment of its inputs and G that of the gradients at its outputs, labels sampled from the
model: the layer's block of the Fisher information in K-FAC's form (arXiv 1503.05671). OBD-LLM
(arXiv 2604.00821) weighs a decomposition's error so; to divide a budget by it is ours. ``hull``
measures one KL per layer on the whole model, which grows with the square of the depth; this grows
with the depth.

The prediction is of the cut itself. For components in the metric H (svd_llm and those that share
its decompositions) it is ½ Σ λ_i u_iᵀ G u_i over those that are dropped; in other metrics and for
layers that share a basis the same trace is taken with the cross terms. What fits a layer after the
cut is not in it. It is a second-order estimate, layer by layer: errors of several layers are taken
to add up.

With ``labels=text`` G is the "empirical" Fisher information, which is no second derivative of
anything. Its ranks are none the worse on small models: perplexity of svd_llm at kept 0.6 with
sampled labels and with the text's, as in docs/results (seed 3), stories260K 151.7 and 136.7,
babyllama-1m 4.585 and 4.380, wiki-llama-5m 57.44 and 57.41.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from compress_core.allocate.base import (
    Curvature,
    Evidence,
    budget_of,
    check_one_component_each,
)
from compress_core.allocate.buying import buy, curve_of
from compress_core.errors import ConfigError
from compress_core.options import one_of
from compress_core.types import LayerRef, Share


@dataclass(frozen=True)
class Fisher:
    """Components at an equal slope, by gradients of the whole model in place of measured KL.

    Buys like ``hull``, on the lower convex hull of every layer's (cost, predicted divergence)
    curve.

    Attributes:
        windows: Calibration windows for the gradients; 0 for all.
        labels: "sampled" from the model, for the Fisher information itself, or the "text"'s own.
        damp: Part of G's mean diagonal that is added to its diagonal; K-FAC needs some where sums
            over few tokens leave directions out.
    """

    windows: int = 16
    labels: str = "sampled"
    damp: float = 0.03
    reads: ClassVar[frozenset[str]] = frozenset({"predicted"})

    def __post_init__(self) -> None:
        if self.windows < 0:
            raise ConfigError(f"windows must be at least 0 (0 for all), got {self.windows}")
        one_of("allocator 'fisher'", "labels", self.labels, ("sampled", "text"))
        if not 0 <= self.damp < math.inf:
            raise ConfigError(f"damp must be at least 0, got {self.damp:g}")

    def probe(self, kept: float) -> Curvature | None:
        """Every layer's curve, whatever the budget."""
        return Curvature(self.windows, self.labels, self.damp)

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
            predicted = evidence.predicted[layer.name].tolist()
            curves[layer.name] = list(curve_of(layer, predicted.__getitem__))
        return buy(layers, budget_of(layers, kept), curves)
