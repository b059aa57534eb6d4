"""Random contents for the linear layers of tiny models: every kind of part, alone and together."""

from typing import Any

import torch

from compress_core.decompose import LowRank
from compress_core.folder.write import CompressedWeights
from compress_core.forms.kinds import sizes_of
from compress_core.forms.names import EIGHT_BITS, PLAIN
from compress_core.layer.stored import as_parts
from compress_core.sparse import Sparse
from tests.families import linear_names
from tests.made_codes import in_rounded_codes


def stores(
    name: str,
    low: LowRank,
    dtype: torch.dtype = torch.float32,
    form: str = PLAIN,
    shared_with: str | None = None,
) -> CompressedWeights:
    """What a layer stores, of what a fit ended with; the in-factor only where it is its own."""
    tensors, entry = as_parts(low, dtype, form)
    if shared_with is not None:
        del tensors["factor_in"]
        entry["factor_in"] = shared_with
    return CompressedWeights(name, entry, tensors, low.bias)


def varied_layers(model: Any, seed: int = 0) -> list[CompressedWeights]:
    """Random contents for every linear layer: some share an in-factor, some keep columns.

    Every second layer shares the in-factor of the first one with as many inputs; of the others all
    but these firsts keep three columns.
    """
    draw = _Draw(model, seed)
    layers: list[CompressedWeights] = []
    first: dict[int, str] = {}
    for i, name in enumerate(linear_names(model)):
        rows, inputs = sizes_of_layer(model.get_submodule(name))
        if inputs not in first:
            first[inputs] = name
            low = LowRank(draw(rows, 8), draw(8, inputs))
            layers.append(stores(name, low, model.dtype))
        elif i % 2:
            low = LowRank(draw(rows, 8), torch.zeros(8, inputs))
            layers.append(stores(name, low, model.dtype, shared_with=first[inputs]))
        else:
            index = draw.index(inputs, 3)
            low = LowRank(draw(rows, 5), draw(5, inputs - 3), draw(rows, 3), index)
            layers.append(stores(name, low, model.dtype))
    return layers


def sparse_layers(model: Any, seed: int = 0) -> list[CompressedWeights]:
    """Random contents for every linear layer: sparse entries of all kinds, biases, and nothing.

    In turn: many entries alone; factors, few entries and a bias; few entries alone; factors, many
    entries and a bias; nothing but a bias.
    """
    draw = _Draw(model, seed)
    layers = []
    for i, name in enumerate(linear_names(model)):
        rows, inputs = sizes_of_layer(model.get_submodule(name))
        rank, count = ((0, rows * inputs // 2), (4, 20), (0, 20), (3, 300), (0, 0))[i % 5]
        sparse = draw.entries(rows, inputs, count) if count else None
        bias = draw(rows) if i % 5 in (1, 3, 4) else None
        low = LowRank(draw(rows, rank), draw(rank, inputs), sparse=sparse, bias=bias)
        layers.append(stores(name, low, model.dtype))
    return layers


def eight_bit_layers(model: Any, seed: int = 0) -> list[CompressedWeights]:
    """Random factors in 8 bits for every linear layer, every fourth with a bias; one in 16 bits."""
    draw = _Draw(model, seed)
    layers = []
    for i, name in enumerate(linear_names(model)):
        rows, inputs = sizes_of_layer(model.get_submodule(name))
        rank = min(rows, inputs) - 1 if i % 2 else 5  # the largest that pays, and a small one
        rank = 5 if i == 1 else rank
        bias = draw(rows) if i % 4 == 0 else None
        low = LowRank(draw(rows, rank), draw(rank, inputs), bias=bias)
        layers.append(stores(name, low, model.dtype, PLAIN if i == 1 else EIGHT_BITS))
    return layers


def summed_layers(model: Any, seed: int = 0) -> list[CompressedWeights]:
    """Random contents for every linear layer: kinds of parts that older formats had not together.

    In turn: columns and entries beside factors in pivot form, beside factors in 8 bits, and alone;
    pivots beside columns; factors in 8 bits beside entries; pivots. Every fourth gets a bias.
    """
    draw = _Draw(model, seed)
    layers = []
    for i, name in enumerate(linear_names(model)):
        rows, inputs = sizes_of_layer(model.get_submodule(name))
        kept, count = ((2, 20), (3, 150), (5, 30), (2, 0), (0, 25), (0, 0))[i % 6]
        rank = 0 if i % 6 == 2 else 5
        bias = draw(rows) if i % 4 == 0 else None
        sparse = draw.entries(rows, inputs, count) if count else None
        columns, index = (draw(rows, kept), draw.index(inputs, kept)) if kept else (None, None)
        u, v = draw(rows, rank), draw(rank, inputs - kept)
        low = LowRank(u, v, columns, index, sparse, bias)
        form = ("pivot", EIGHT_BITS, PLAIN, "pivot", EIGHT_BITS, "pivot")[i % 6]
        layers.append(stores(name, low, model.dtype, form=form))
    return layers


def coded_layers(model: Any, seed: int = 0) -> list[CompressedWeights]:
    """Random contents for every linear layer: numbers in codes of every width, bases, and sums.

    In turn: a base alone; factors; a base beside factors and entries, all of them in codes; pivots
    beside columns; a base beside factors and a few entries that are not; columns and entries. Every
    fourth gets a bias.
    """
    draw = _Draw(model, seed)
    layers = []
    for i, name in enumerate(linear_names(model)):
        rows, inputs = sizes_of_layer(model.get_submodule(name))
        based, rank, kept, count, bits, group = (
            (True, 0, 0, 0, 4, 32),
            (False, 20, 0, 0, 6, 16),
            (True, 2, 0, 60, 3, 12),
            (False, 7, 3, 0, 5, 16),
            (True, 2, 0, 20, {"base": 2}, 32),
            (False, 0, 4, 40, 8, 32),
        )[i % 6]
        columns, index = (draw(rows, kept), draw.index(inputs, kept)) if kept else (None, None)
        sparse = draw.entries(rows, inputs, count) if count else None
        bias = draw(rows) if i % 4 == 0 else None
        base = draw(rows, inputs) if based else None
        u, v = draw(rows, rank), draw(rank, inputs - kept)
        low = LowRank(u, v, columns, index, sparse, bias, base)
        tensors, entry = as_parts(low, model.dtype, "pivot" if i % 6 == 3 else PLAIN)
        tensors, entry = in_rounded_codes(
            tensors, entry, sizes_of(rows, inputs, entry), bits, group
        )
        layers.append(CompressedWeights(name, entry, tensors, low.bias))
    return layers


class _Draw:
    """Random numbers in a model's dtype, such that what is made of them keeps its size."""

    def __init__(self, model: Any, seed: int) -> None:
        self.dtype, self.generator = model.dtype, torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        numbers = torch.randn(shape, generator=self.generator)
        return (numbers * max(shape[-1], 1) ** -0.5).to(self.dtype)

    def index(self, inputs: int, count: int) -> torch.Tensor:
        """Some inputs, ascending."""
        return torch.randperm(inputs, generator=self.generator)[:count].sort().values

    def entries(self, rows: int, inputs: int, count: int) -> Sparse:
        """Entries in as many places."""
        places = torch.randperm(rows * inputs, generator=self.generator) < count
        return Sparse.of(self(rows, inputs), places.view(rows, inputs))


def sizes_of_layer(layer: Any) -> tuple[int, int]:
    """(out, in), whichever way the layer keeps its weight."""
    rows, columns = layer.weight.shape
    return (columns, rows) if type(layer).__name__ == "Conv1D" else (rows, columns)
