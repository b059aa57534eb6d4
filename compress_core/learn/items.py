"""All that a model's layers can keep, as one long list of items with a price each.

A layer's singular triples (price out + in) come first, then its sparse entries (price 1), row by
row; layers follow one another in the layout's order. Of an item nothing is held here; a score takes
4 bytes and a mask one, and the cut sorts only what lies near its threshold.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from compress_core.learn.base import Atoms, Chosen
from compress_core.learn.keep import Prices
from compress_core.learn.select import Run, buy
from compress_core.sparse import Sparse
from compress_core.types import LayerRef, ModelLayout, affordable

HELD_BYTES = 1 << 30
"""Atoms of all layers together up to which they are held; above, each is read when it is needed."""


class Items:
    """The items, where each layer's are, and the model that they make.

    Args:
        model: The whole dense model; its layers' weights are overwritten, and put back by
            :meth:`restored`.
        layout: Its layout.
        atoms: Reads a layer's atoms.
        kept: Of the compressible parameters.
        anchored: Whether a weight is the dense model's wherever an entry stays, as ``refit=anchor``
            makes it, in place of the sum of what stays.

    Attributes:
        prices: Of the items.
        budget: Whole numbers that may be stored.
    """

    def __init__(
        self,
        model: Any,
        layout: ModelLayout,
        atoms: Callable[[LayerRef], Atoms],
        kept: float,
        anchored: bool = False,
    ) -> None:
        self.model, self.anchored = model, anchored
        self.layers: Sequence[LayerRef] = layout.layers
        self._read = atoms
        self._held: dict[str, Atoms] = {}
        self._dense: list[Tensor] = []  # weights, while they are overwritten
        self._bytes = 0
        self.total = sum(layer.dense_cost for layer in self.layers)
        self.budget = affordable(kept, self.total)
        self.counts: list[tuple[int, int]] = []  # components and entries of each layer
        for layer in self.layers:
            found = self.atoms(layer)
            entries = 0 if found.sparse is None else found.sparse.nonzeros
            self.counts.append((len(found.ut), entries))
        pairs = zip(self.layers, self.counts, strict=True)
        self.prices = Prices(
            [run for layer, pair in pairs for run in zip(pair, (layer.atom_cost, 1), strict=True)]
        )

    def __len__(self) -> int:
        return len(self.prices)

    def atoms(self, layer: LayerRef) -> Atoms:
        """A layer's atoms, from memory where there is room for them."""
        if layer.name in self._held:
            return self._held[layer.name]
        found = self._read(layer)
        size = 4 * (found.ut.numel() + found.v.numel() + layer.dense_cost)
        if self._bytes + size <= HELD_BYTES:
            self._held[layer.name] = found
            self._bytes += size
        return found

    def parts(self, vector: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Views of a vector over items: of each layer, its components' and its entries'."""
        found = [part for part, _ in self.prices.split(vector)]
        return list(zip(found[::2], found[1::2], strict=True))

    def whole(self, vector: Tensor) -> Sequence[Tensor]:
        """Views of a vector over items: each layer's."""
        return vector.split([sum(pair) for pair in self.counts])

    def weight(self, layer: LayerRef) -> Tensor:
        """The model's own weight of a layer, (out, in)."""
        weight = self.model.get_submodule(layer.name).weight.detach()
        return weight.T if layer.transposed else weight

    @torch.no_grad()
    def put(self, keep: Callable[[int], tuple[Tensor, Tensor]]) -> None:
        """Overwrites the model's weights by what is kept, layer after layer.

        Args:
            keep: Of a layer's number: bool masks over its components and over its entries.
        """
        for number, layer in enumerate(self.layers):
            weight, atoms, masks = self.weight(layer), self.atoms(layer), keep(number)
            found = build(atoms, *masks, weight.device)
            if self.anchored and atoms.sparse is not None:
                places = where(atoms.sparse, masks[1]).to(weight.device)
                found[places] = self.dense(number)[places].to(found.dtype)
            weight.copy_(found)

    def dense(self, number: int) -> Tensor:
        """The dense weight of a layer (out, in) while :meth:`restored` is open, on its device."""
        return self._dense[number].to(self.weight(self.layers[number]).device)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Puts the dense weights back at the end; the copies are on the CPU."""
        self._dense = [self.weight(layer).to("cpu", copy=True) for layer in self.layers]
        try:
            yield
        finally:
            with torch.no_grad():
                for layer, weight in zip(self.layers, self._dense, strict=True):
                    self.weight(layer).copy_(weight)
            self._dense = []

    def cut(self, score: Tensor) -> tuple[Tensor, list[bool]]:
        """What to keep of items by how good they are, never above the budget.

        Every layer keeps its best item. One whose items come to as much as its weight stays dense
        instead, and what that saves is spent on others.

        Args:
            score: Larger is better, float32 (items,); ties go by place.

        Returns:
            A bool mask over items, and for each layer whether it stays dense.
        """
        if self.budget >= self.total:
            return torch.ones(len(self), dtype=torch.bool), [True] * len(self.layers)
        mask = torch.zeros(len(self), dtype=torch.bool)
        for scores, flags in zip(self.whole(score), self.whole(mask), strict=True):
            if len(scores):  # a weight of zeros has no items
                flags[(scores == scores.max()).nonzero()[0]] = True
        dense = [False] * len(self.layers)
        room = self.budget - sum(self.spent(mask))
        while True:
            pairs = zip(self.prices.split(score), self.prices.split(mask), strict=True)
            runs = [
                Run(scores, flags, price)
                for number, ((scores, price), (flags, _)) in enumerate(pairs)
                if not dense[number // 2]
            ]
            room = buy(runs, room)
            saved = self._densify(mask, dense)
            if not saved:
                return mask, dense
            room += saved

    def spent(self, mask: Tensor) -> list[int]:
        """Of each layer, what the items of a mask over all items cost."""
        return [
            int(components.sum()) * layer.atom_cost + int(entries.sum())
            for layer, (components, entries) in zip(self.layers, self.parts(mask), strict=True)
        ]

    def _densify(self, mask: Tensor, dense: list[bool]) -> int:
        """Marks layers whose items cost as much as the weight, and says what that saves."""
        saved = 0
        for number, (layer, cost) in enumerate(zip(self.layers, self.spent(mask), strict=True)):
            if not dense[number] and cost >= layer.dense_cost:
                dense[number] = True
                saved += cost - layer.dense_cost
        return saved

    def put_cut(self, mask: Tensor, dense: Sequence[bool]) -> None:
        """Overwrites the model's weights by a cut; a dense layer keeps all of its atoms."""
        parts = self.parts(mask)

        def keep(number: int) -> tuple[Tensor, Tensor]:
            components, entries = parts[number]
            if dense[number]:
                return torch.ones_like(components), torch.ones_like(entries)
            return components, entries

        self.put(keep)

    def chosen(self, mask: Tensor, dense: Sequence[bool]) -> dict[str, Chosen]:
        """A cut in the words of every learner."""
        found = {}
        for number, (components, entries) in enumerate(self.parts(mask)):
            index = components.nonzero().flatten()
            keeps = entries if bool(entries.any()) else None
            found[self.layers[number].name] = (
                Chosen(None) if dense[number] else Chosen(index, torch.ones(len(index)), keeps)
            )
        return found


def where(sparse: Sparse, entries: Tensor) -> Tensor:
    """The mask (out, in) of the kept ones of a layer's entries."""
    return sparse.mask.masked_scatter(sparse.mask, entries)


def build(atoms: Atoms, components: Tensor, entries: Tensor, device: torch.device | str) -> Tensor:
    """The weight (out, in) that the kept ones of a layer's atoms make, float32."""
    ut, v = atoms.ut[components].to(device), atoms.v[components].to(device)
    weight = ut.T @ v
    if atoms.sparse is not None and atoms.sparse.nonzeros:
        values = (atoms.sparse.values * entries).to(device)
        weight[atoms.sparse.mask.to(device)] += values
    return weight
