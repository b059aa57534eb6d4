"""A model whose layers are spectra with a trainable score on every component.

A layer computes y = U (s ⊙ (V x)) + b + d with frozen U and V: its weight is never built. With all
scores 1 and d = 0 that is the dense layer, to rounding.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress_core.errors import BudgetError
from compress_core.learn.base import Atoms, Chosen
from compress_core.learn.keep import ranking
from compress_core.types import LayerRef, affordable

Scores = Callable[[], Tensor]


class SpectralLinear(nn.Module):
    """One layer; its scores are computed by whoever trains them.

    Args:
        u: (out, components), frozen.
        v: (components, in), frozen.
        bias: (out,), frozen, or None.
        scores: Gives (components,), float32.
        deviation: Gives (out,), float32.
    """

    def __init__(
        self, u: Tensor, v: Tensor, bias: Tensor | None, scores: Scores, deviation: Scores
    ) -> None:
        super().__init__()
        self.u = nn.Parameter(u, requires_grad=False)
        self.v = nn.Parameter(v, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.scores = scores
        self.deviation = deviation

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        shift = self.deviation().to(x.dtype)
        low = F.linear(x, self.v) * self.scores().to(x.dtype)
        return F.linear(low, self.u, shift if self.bias is None else self.bias + shift)


@dataclass(frozen=True)
class Spectra:
    """All layers' components in one line, so that a global choice is one sort.

    Attributes:
        layers: Every compressible layer.
        starts: Where each layer's components begin, and after the last one their number.
        outs: The same of the layers' outputs.
        worth: Energy of a component for each number that a layer's first takes, for ties; float64.
    """

    layers: tuple[LayerRef, ...]
    starts: tuple[int, ...]
    outs: tuple[int, ...]
    worth: Tensor

    @classmethod
    def of(cls, layers: Sequence[LayerRef], energies: Sequence[Tensor]) -> "Spectra":
        """The line of these layers' components."""
        starts, outs = [0], [0]
        for layer, energy in zip(layers, energies, strict=True):
            starts.append(starts[-1] + len(energy))
            outs.append(outs[-1] + layer.out_features)
        pairs = list(zip(layers, energies, strict=True))
        worth = [e.double().cpu() / x.atom_cost for x, e in pairs]
        return cls(tuple(layers), tuple(starts), tuple(outs), torch.cat(worth))

    @property
    def dense_cost(self) -> int:
        """Numbers of all layers' weights."""
        return sum(layer.dense_cost for layer in self.layers)

    def part(self, index: int) -> slice:
        """Where the components of layer ``index`` are."""
        return slice(self.starts[index], self.starts[index + 1])

    def outputs(self, index: int) -> slice:
        """Where the outputs of layer ``index`` are."""
        return slice(self.outs[index], self.outs[index + 1])

    def counts(self, alive: Tensor) -> list[int]:
        """Components of each layer that are ``alive`` (bool)."""
        return [int(alive[self.part(i)].sum()) for i in range(len(self.layers))]

    def most(self, index: int, extra: int) -> int:
        """Largest rank at which factors and ``extra`` numbers cost less than the dense weight."""
        layer = self.layers[index]
        return layer.affordable_rank(max(0, layer.dense_cost - 1 - extra))

    def prices(self, alive: Tensor) -> Tensor:
        """Share of the layers' numbers that a component takes, on average, float64 (components,).

        In plain factors that is each one's own. In the pivot form the last of a square layer's
        components costs hardly anything, all of them cost the dense weight, and what presses the
        share down has to see that.

        Args:
            alive: bool, all components.
        """
        found = torch.empty(self.starts[-1], dtype=torch.float64)
        for index, count in enumerate(self.counts(alive)):
            rank = max(1, count)
            found[self.part(index)] = self.layers[index].rank_cost(rank) / rank
        return found / self.dense_cost

    def kept(self, alive: Tensor, extras: bool) -> float:
        """Share of the layers' numbers stored if ``alive`` components stay.

        A layer of more components than pay is charged as dense.

        Args:
            alive: bool, all components.
            extras: Whether a layer that is not dense stores ``out`` numbers more.
        """
        total = 0
        for index, count in enumerate(self.counts(alive)):
            layer = self.layers[index]
            extra = layer.out_features if extras else 0
            dense = count > self.most(index, extra)
            total += layer.dense_cost if dense else layer.rank_cost(count) + extra
        return total / self.dense_cost


def install(
    model: Any,
    spectra: Spectra,
    atoms: Mapping[str, Atoms],
    scores: Callable[[int], Tensor],
    deviation: Callable[[int], Tensor],
) -> None:
    """Puts spectral layers in place of all dense ones, and freezes everything else.

    Args:
        model: The whole dense model.
        spectra: Its layers.
        atoms: Layer name to its components.
        scores: Layer's place in ``spectra`` to its scores.
        deviation: The same to what is added to its outputs.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for index, layer in enumerate(spectra.layers):
        dense: Any = model.get_submodule(layer.name)
        weight, found = dense.weight, atoms[layer.name]
        spectral = SpectralLinear(
            found.ut.T.to(weight).contiguous(),
            found.v.to(weight),
            dense.bias,
            partial(scores, index),
            partial(deviation, index),
        )
        model.set_submodule(layer.name, spectral)


def affordable_dense(
    spectra: Spectra, wanted: Sequence[float], kept: float, extras: bool
) -> list[bool]:
    """Which layers stay dense: those that want it, the most wanted first, within the budget.

    Args:
        spectra: All components.
        wanted: Of each layer, how much it is wanted; not at all up to 0.
        kept: In (0, 1], of the layers' numbers.
        extras: As in :meth:`Spectra.kept`.
    """
    extra = [layer.out_features if extras else 0 for layer in spectra.layers]
    least = [
        layer.atom_cost + more if spectra.most(index, more) else layer.dense_cost
        for index, (layer, more) in enumerate(zip(spectra.layers, extra, strict=True))
    ]
    left = affordable(kept, spectra.dense_cost) - sum(least)
    found = [False] * len(wanted)
    for index in sorted(range(len(wanted)), key=lambda i: -wanted[i]):
        more = spectra.layers[index].dense_cost - least[index]
        if wanted[index] > 0 and more <= left:
            found[index] = True
            left -= more
    return found


def cut(
    spectra: Spectra, scores: Tensor, kept: float, dense: Sequence[bool], extras: bool
) -> list[Tensor | None]:
    """The exact budget: components by score over all layers until nothing more fits.

    Every layer keeps its best component. Ties go to the larger energy per number.

    Args:
        spectra: All components.
        scores: Of all components, (components,).
        kept: In (0, 1], of the layers' numbers.
        dense: Which layers stay dense.
        extras: As in :meth:`Spectra.kept`.

    Returns:
        Each layer's components that stay, ascending int64; None where it is dense.

    Raises:
        BudgetError: The dense layers and one component of every other exceed the budget.
    """
    left = affordable(kept, spectra.dense_cost)
    most, chosen = [], []
    for index, layer in enumerate(spectra.layers):
        extra = layer.out_features if extras else 0
        most.append(0 if dense[index] else spectra.most(index, extra))
        left -= extra if most[index] else layer.dense_cost
        chosen.append([_best(spectra, scores, index)] if most[index] else [])
        left -= len(chosen[index]) * layer.atom_cost
    if left < 0:
        raise BudgetError(f"kept={kept:g} is exceeded by {-left} numbers of what must stay")
    order = ranking(scores.double().cpu(), spectra.worth)
    owner = torch.repeat_interleave(
        torch.arange(len(spectra.layers)), torch.tensor(spectra.starts).diff()
    )
    for place, index in zip(order.tolist(), owner[order].tolist(), strict=True):
        rank, layer = len(chosen[index]), spectra.layers[index]
        if rank == most[index] or place == chosen[index][0]:
            continue
        cost = layer.rank_cost(rank + 1) - layer.rank_cost(rank)
        if cost <= left:
            chosen[index].append(place)
            left -= cost
    return [
        None if most[index] == 0 else torch.tensor(sorted(places)) - spectra.starts[index]
        for index, places in enumerate(chosen)
    ]


def _best(spectra: Spectra, scores: Tensor, index: int) -> int:
    part = spectra.part(index)
    order = ranking(scores[part].double().cpu(), spectra.worth[part])
    return part.start + int(order[0])


def choose(
    spectra: Spectra,
    places: Sequence[Tensor | None],
    scores: Tensor,
    deviation: Tensor | None,
) -> dict[str, Chosen]:
    """What every layer keeps, from the components that stay."""
    found = {}
    for index, layer in enumerate(spectra.layers):
        stay = places[index]
        if stay is None:
            found[layer.name] = Chosen(None)
            continue
        scale = scores[spectra.part(index)].detach().float().cpu()[stay]
        bias = None
        if deviation is not None:
            bias = deviation[spectra.outputs(index)].detach().float().cpu().clone()
        found[layer.name] = Chosen(stay, scale, bias=bias)
    return found


def overlap(places: Sequence[Tensor | None]) -> float:
    """Share of the components that stay which would stay in the order of singular values too."""
    kept = [stay for stay in places if stay is not None]
    same = sum(int((stay < len(stay)).sum()) for stay in kept)
    return same / max(1, sum(len(stay) for stay in kept))
