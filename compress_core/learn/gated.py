"""Scores on whole spectra, with a gate around the threshold below which a component is dropped."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress_core.learn.spectrum import Spectra, affordable_dense

Map = Literal["softplus", "sigmoid", "relu"]
Order = Literal["score", "sigma"]

START = {"softplus": 0.5413248546129181, "sigmoid": 0.0, "relu": 1.0}  # where each map gives 1
WIDE = 0.1  # of the gate, at the beginning


def score_map(kind: Map, raw: Tensor) -> Tensor:
    """Scores of raw parameters: never negative, 1 at the start; only sigmoid's end (at 2)."""
    if kind == "softplus":
        return F.softplus(raw)
    return 2 * torch.sigmoid(raw) if kind == "sigmoid" else F.relu(raw)


class GatedSpectra:
    """Scores and deviations of all layers as two flat parameters, and how the gate stands.

    Args:
        spectra: All components.
        kind: From raw parameters to scores.
        threshold: Scores below it are dropped.
        order: "sigma" sorts every layer's scores, so that the largest singular values survive.
        extras: Whether a factored layer stores a deviation.
        device: Where the parameters are.

    Attributes:
        raw: (components,), the trained parameters behind the scores.
        shift: (outputs,), the deviations.
        dense: (layers,) bool, which layers stay dense as they were.
        blend: From 0 (every component contributes) to 1 (dropped ones do not).
        width: Of the gate around the threshold.
    """

    def __init__(
        self,
        spectra: Spectra,
        kind: Map,
        threshold: float,
        order: Order,
        extras: bool,
        device: str,
    ) -> None:
        self.spectra, self.kind, self.threshold = spectra, kind, threshold
        self.order, self.extras = order, extras
        start = torch.full((spectra.starts[-1],), START[kind])
        self.raw = nn.Parameter(start.to(device))
        self.shift = nn.Parameter(torch.zeros(spectra.outs[-1], device=device))
        self.dense = torch.zeros(len(spectra.layers), dtype=torch.bool)
        self.blend, self.width = 0.0, WIDE

    def scores(self, index: int) -> Tensor:
        """Scores of a layer, (components,); those of a settled dense layer are 1."""
        part = self.spectra.part(index)
        if self.dense[index]:
            return torch.ones(part.stop - part.start, device=self.raw.device)
        scores = score_map(self.kind, self.raw[part])
        return scores.sort(descending=True).values if self.order == "sigma" else scores

    def effective(self, index: int) -> Tensor:
        """What a layer's components are multiplied by: scores behind the gate."""
        scores = self.scores(index)
        if self.blend == 0 or self.dense[index]:
            return scores
        return scores * (1 - self.blend + self.blend * self.gate(scores))

    def gate(self, scores: Tensor) -> Tensor:
        """Near 0 below the threshold, near 1 above it, and exactly 1 at a score of 1."""
        at_one = 1 / (1 + math.exp((self.threshold - 1) / self.width))
        return torch.sigmoid((scores - self.threshold) / self.width) / at_one

    def deviation(self, index: int) -> Tensor:
        """What is added to a layer's outputs, (out,)."""
        shift = self.shift[self.spectra.outputs(index)]
        return torch.zeros_like(shift) if self.dense[index] else shift

    def all_scores(self) -> Tensor:
        """Scores of all layers in one line."""
        return torch.cat([self.scores(index) for index in range(len(self.spectra.layers))])

    def share(self, scores: Tensor) -> float:
        """Share of the layers' numbers that would be stored now."""
        return self.spectra.share(scores.detach().cpu() > self.threshold, self.extras)

    def settle(self, kept: float) -> None:
        """Layers of which more stays than pays are dense from here on, as far as they fit."""
        alive = self.all_scores().detach().cpu() > self.threshold
        beyond = []
        for index, count in enumerate(self.spectra.counts(alive)):
            layer = self.spectra.layers[index]
            most = self.spectra.most(index, layer.out_features if self.extras else 0)
            beyond.append((count - most) / max(1, most))
        dense = affordable_dense(self.spectra, beyond, kept, self.extras)
        self.dense.copy_(torch.tensor(dense))
