"""A method applied to layers in memory: what the stages do with a store, done without one."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress_core.decompose import LowRank, Prepared, ReadRows
from compress_core.method import Method
from compress_core.metric import Metric
from compress_core.refine.base import DENSE, Moments
from compress_core.refine.columns import index_cost
from compress_core.stats import InputAccumulator, InputStats
from compress_core.types import Share


@dataclass(frozen=True)
class Seen:
    """A layer's weight and what it reads.

    Attributes:
        weight: (out, in), float64.
        dense: Its inputs in the dense model, (tokens, in), float64.
        behind: The same tokens behind compressed layers.
        fisher: Fisher information of its columns, (in,).
    """

    weight: Tensor
    dense: Tensor
    behind: Tensor
    fisher: Tensor


def first_rows(prepared: Prepared) -> ReadRows:
    """Reads a decomposition from memory, as the store would from disk."""
    return lambda name, rows: prepared.arrays[name][:rows]


def metric_of(method: Method, stack: Sequence[Seen]) -> Metric:
    """The metric of a stack of layers: that of their summed statistics."""
    if "fisher" in method.weighting.needs:
        return method.weighting.metric(torch.stack([layer.fisher for layer in stack]).sum(dim=0))
    parts = []
    for layer in stack:
        accumulator = InputAccumulator(layer.dense.shape[1])
        accumulator.add(layer.dense[None])
        parts.append(accumulator.finish())
    gram = torch.stack([part.gram for part in parts]).sum(dim=0)
    abs_sum = torch.stack([part.abs_sum for part in parts]).sum(dim=0)
    return method.weighting.metric(InputStats(parts[0].tokens, gram, abs_sum))


def prepare(method: Method, stack: Sequence[Seen], rank: int) -> Prepared:
    """The decomposition of a stack of layers."""
    weight = torch.cat([layer.weight for layer in stack])
    return method.decompose.prepare(weight, metric_of(method, stack), rank)


def realise(
    method: Method, stack: Sequence[Seen], prepared: Prepared | None, share: Share
) -> list[LowRank]:
    """What every layer of a stack stores: refined where the method refines, or pruned."""
    if method.prune is not None:
        (layer,) = stack
        return [method.prune.prune(layer.weight, share, _moments(method, layer))]
    assert prepared is not None
    whole = method.decompose.realise(first_rows(prepared), share)
    found, row = [], 0
    for layer in stack:
        u = whole.u[row : row + len(layer.weight)]
        row += len(layer.weight)
        factors = LowRank(u.double(), whole.v.double())
        if method.refine is not None:
            factors = method.refine.refine(layer.weight, factors, _moments(method, layer))
        found.append(factors)
    return found


def numbers_of(members: Sequence[LowRank]) -> int:
    """Numbers stored for a stack: its in-factor once, every layer's own part, columns' indices."""
    numbers = members[0].v.numel()
    for low in members:
        numbers += low.u.numel()
        if low.columns is not None and low.index is not None:
            features = low.v.shape[1] + len(low.index)
            numbers += low.columns.numel() + len(low.index) * index_cost(features)
        if low.sparse is not None:
            numbers += low.sparse.nonzeros
    return numbers


def output_error(layer: Seen, low: LowRank) -> float:
    """Squared error per token of the output on the dense model's inputs."""
    error = layer.dense @ (low.dense() - layer.weight).T
    return float(error.square().sum()) / len(layer.dense)


def _moments(method: Method, layer: Seen) -> Moments:
    fitted = method.refine or method.prune
    assert fitted is not None
    tokens = len(layer.dense)
    if DENSE in fitted.reads:
        assert not method.sequential
        return Moments(dense=layer.dense.T @ layer.dense / tokens)
    return Moments(
        prefix=layer.behind.T @ layer.behind / tokens, cross=layer.dense.T @ layer.behind / tokens
    )
