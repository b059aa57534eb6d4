"""Scores on whole spectra, with a gate at the threshold below which a component is dropped."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress_core.learn.spectrum import Spectra, affordable_dense, cut

Map = Literal["softplus", "sigmoid", "relu"]
Order = Literal["score", "sigma"]

START = {"softplus": 0.5413248546129181, "sigmoid": 0.0, "relu": 1.0}  # where each map gives 1
WIDTH = 0.1  # of the gate that gradients see


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
        stays: (components,) bool, what stays once that is settled.
        settled: Whether it is.
        open: Whether dropped components contribute all the same.
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
        self.stays = torch.ones(spectra.starts[-1], dtype=torch.bool, device=device)
        self.settled = torch.tensor(False)
        self.open = False

    def scores(self, index: int) -> Tensor:
        """Scores of a layer, (components,); those of a settled dense layer are 1."""
        part = self.spectra.part(index)
        if self.dense[index]:
            return torch.ones(part.stop - part.start, device=self.raw.device)
        scores = score_map(self.kind, self.raw[part])
        return scores.sort(descending=True).values if self.order == "sigma" else scores

    def effective(self, index: int) -> Tensor:
        """What a layer's components are multiplied by: scores behind the gate.

        The gate is hard, so that the model is the one that would be stored; gradients see a
        sigmoid in its place, so that a dropped component can come back (not with map "relu" and
        a raw score below 0, where it has no slope).
        """
        scores = self.scores(index)
        if self.dense[index]:
            return scores
        if self.settled:
            return scores * self.stays[self.spectra.part(index)]
        if self.open:
            return scores
        soft = self.gate(scores)
        hard = (scores > self.threshold).to(soft)
        return scores * (hard + soft - soft.detach())

    def gate(self, scores: Tensor) -> Tensor:
        """Near 0 below the threshold, near 1 above it."""
        return torch.sigmoid((scores - self.threshold) / WIDTH)

    def deviation(self, index: int) -> Tensor:
        """What is added to a layer's outputs, (out,)."""
        shift = self.shift[self.spectra.outputs(index)]
        return torch.zeros_like(shift) if self.dense[index] else shift

    def all_scores(self) -> Tensor:
        """Scores of all layers in one line."""
        return torch.cat([self.scores(index) for index in range(len(self.spectra.layers))])

    def alive(self, scores: Tensor) -> Tensor:
        """What would stay now: bool on the CPU, (components,)."""
        return self._stays() if self.settled else scores.detach().cpu() > self.threshold

    def settle(self, kept: float) -> None:
        """Decides what stays, at the exact budget; layers of which more stays than pays are dense.

        Raises:
            BudgetError: As :func:`cut`.
        """
        scores = self.all_scores().detach()
        beyond = []
        for index, count in enumerate(self.spectra.counts(self.alive(scores))):
            layer = self.spectra.layers[index]
            most = self.spectra.most(index, layer.out_features if self.extras else 0)
            beyond.append((count - most) / max(1, most))
        dense = affordable_dense(self.spectra, beyond, kept, self.extras)
        places = cut(self.spectra, scores, kept, dense, self.extras)
        self.dense.copy_(torch.tensor([stay is None for stay in places]))
        self.stays.zero_()
        for index, stay in enumerate(places):
            if stay is not None:
                self.stays[self.spectra.starts[index] + stay.to(self.stays.device)] = True
        self.settled.fill_(True)

    def _stays(self) -> Tensor:
        """What stays, with all components of dense layers."""
        stays = self.stays.cpu().clone()
        for index in range(len(self.spectra.layers)):
            if self.dense[index]:
                stays[self.spectra.part(index)] = True
        return stays

    def places(self) -> Sequence[Tensor | None]:
        """Each layer's components that stay, ascending; None where it is dense."""
        stays = self.stays.cpu()
        return [
            None if self.dense[i] else stays[self.spectra.part(i)].nonzero().flatten()
            for i in range(len(self.spectra.layers))
        ]
