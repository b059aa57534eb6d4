"""A layer decomposed once, and then cut, fitted or pruned to any share.

A stack is what is decomposed as one: a layer by itself, or layers that share an in-factor.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress_core.coding.correct import code_by_turns
from compress_core.coding.parts import CodedParts
from compress_core.coding.settings import Coding
from compress_core.coding.whole import of_whole
from compress_core.decompose import Decomposer, LowRank, Prepared
from compress_core.errors import CompressError, NumericsError
from compress_core.finite import all_finite
from compress_core.fit import Fitter, Moments
from compress_core.forms.names import FULL
from compress_core.layer.stored import pack_sparse, unpack_sparse
from compress_core.learn.base import Atoms, Chosen, pick
from compress_core.metric import Metric
from compress_core.record import Packed, Record
from compress_core.sparse import Sparse
from compress_core.stats import InputStats, PrefixStats
from compress_core.types import LayerRef, Share, Stack


def dense_weight(stored: Tensor, layer: LayerRef) -> Tensor:
    """A layer's weight (out, in), from the tensor in its file."""
    return stored.T if layer.transposed else stored


def rows_of(stack: Stack, layer: LayerRef) -> slice:
    """Where a layer's rows are in its stack."""
    start = 0
    for member in stack.members:
        if member.name == layer.name:
            break
        start += member.out_features
    return slice(start, start + layer.out_features)


def decompose_stack(
    decomposer: Decomposer,
    stack: Stack,
    weights: Sequence[Tensor],
    metric: Metric,
    rank: int,
    device: torch.device | str = "cpu",
) -> Prepared:
    """The decomposition of a stack, for every budget.

    Args:
        decomposer: The method's.
        stack: Whose.
        weights: Of its members, (out, in) each.
        metric: In which error is measured.
        rank: Components at most.
        device: Where it is computed.

    Raises:
        CompressError: As the decomposer, with the layer named.
    """
    whole = weights[0] if len(weights) == 1 else torch.cat(list(weights))
    try:
        return decomposer.prepare(whole.to(device), metric.to(device), rank)
    except CompressError as error:
        raise type(error)(f"layer {stack.as_layer.name}: {error}") from error


def pack_prepared(prepared: Prepared) -> Packed:
    """What is kept of a decomposition."""
    tensors = {**prepared.arrays, "loss": prepared.loss}
    if prepared.sparse is None:
        return Packed(tensors)
    entries = pack_sparse(prepared.sparse, torch.float32)
    return Packed({**tensors, **entries.tensors}, entries.attrs)


def read_atoms(record: Record) -> Atoms:
    """All that a decomposition offers."""
    loss = record.tensor("loss")
    ut, v = record.tensor("ut"), record.tensor("v")
    return Atoms(ut, v, (loss[:-1] - loss[1:])[: len(ut)], unpack_sparse(record))


@dataclass(frozen=True)
class Given:
    """What one layer is made of.

    Attributes:
        layer: The layer.
        stack: The stack it belongs to.
        weight: Reads its dense weight (out, in); only fitters ask.
        decomposition: What is kept of its stack's, if anything was decomposed.
        dense: Statistics of its input in the dense model, if they are read.
        behind: The same behind compressed layers.
        device: Where it is computed.
    """

    layer: LayerRef
    stack: Stack
    weight: Callable[[], Tensor]
    decomposition: Record | None = None
    dense: InputStats | None = None
    behind: PrefixStats | None = None
    device: torch.device | str = "cpu"

    def wide(self, tensor: Tensor) -> Tensor:
        """In float64, where it is computed."""
        return tensor.to(self.device, torch.float64)

    def widened(self, low: LowRank) -> LowRank:
        """Factors and entries in float64, where it is computed; what else there is as it was."""
        sparse = low.sparse and Sparse(
            low.sparse.mask.to(self.device), self.wide(low.sparse.values)
        )
        return replace(low, u=self.wide(low.u), v=self.wide(low.v), sparse=sparse)

    def moments(self) -> Moments:
        """Second moments of what was measured."""
        return Moments(
            dense=None if self.dense is None else self.wide(self.dense.moment),
            prefix=None if self.behind is None else self.wide(self.behind.moment),
            cross=None if self.behind is None else self.wide(self.behind.cross_moment),
        )


def realise_share(
    decomposer: Decomposer | None,
    fitter: Fitter | None,
    given: Given,
    share: Share,
    pruner: Fitter | None = None,
    keeper: Fitter | None = None,
) -> LowRank | None:
    """What a layer stores at its share; None for the dense weight.

    Args:
        decomposer: None for methods that prune.
        fitter: None leaves factors as they were cut.
        given: What the layer is made of.
        share: The layer's.
        pruner: Makes layers of entries where there is a decomposer.
        keeper: Makes layers of columns there.

    Raises:
        CompressError: As the fitter; NumericsError where what it made is not finite.
    """
    if share.rank is None:
        return None if share.bits in (None, FULL) else of_whole(given.wide(given.weight()))
    if decomposer is None:
        assert fitter is not None
        return _fitted(fitter, given, share)
    if share.nonzeros or share.columns:
        maker = pruner if share.nonzeros else keeper
        assert maker is not None and share.rank == 0
        return _fitted(maker, given, share)
    cut = cut_layer(decomposer, given, share)
    if fitter is None:
        return _finite(given.layer, cut)
    return _fitted(fitter, given, given.widened(cut))


def code_share(
    coding: Coding, given: Given, low: LowRank, share: Share, form: str, dtype: torch.dtype
) -> CodedParts:
    """What a layer stores in codes at its share, in the metric of what it reads.

    Raises:
        CompressError: As :func:`compress_core.coding.correct.code_by_turns`.
    """
    moments = given.moments()
    moment = moments.dense if moments.prefix is None else moments.prefix
    assert share.bits is not None
    try:
        return code_by_turns(given.widened(low), moment, coding.at(share.bits), form, dtype)
    except CompressError as error:
        raise type(error)(f"layer {given.layer.name}: {error}") from error


def cut_layer(decomposer: Decomposer, given: Given, share: Share) -> LowRank:
    """A layer's own rows of its stack's decomposition at a share."""
    assert given.decomposition is not None
    whole = decomposer.realise(given.decomposition.tensor, share)
    return LowRank(whole.u[rows_of(given.stack, given.layer)].contiguous(), whole.v)


def stack_weights(
    decomposer: Decomposer, stack: Stack, record: Record, share: Share
) -> dict[str, Tensor]:
    """Layer to weight (out, in), of a stack that is cut to a share and no more."""
    whole = decomposer.realise(record.tensor, share).dense()
    return {member.name: whole[rows_of(stack, member)] for member in stack.members}


def realise_chosen(fitter: Fitter | None, given: Given, chosen: Chosen) -> LowRank | None:
    """What was learned that a layer keeps, fitted where the method fits; None for the dense weight.

    Raises:
        CompressError: As :func:`realise_share`.
    """
    assert given.decomposition is not None
    factors = pick(read_atoms(given.decomposition), chosen)
    if factors is None:
        return None
    if fitter is None:
        return _finite(given.layer, factors)
    return _fitted(fitter, given, given.widened(factors))


def _fitted(fitter: Fitter, given: Given, start: LowRank | Share) -> LowRank:
    try:
        found = fitter.fit(given.wide(given.weight()), start, given.moments())
    except CompressError as error:
        raise type(error)(f"layer {given.layer.name}: {error}") from error
    return _finite(given.layer, found)


def _finite(layer: LayerRef, factors: LowRank) -> LowRank:
    sparse = None if factors.sparse is None else factors.sparse.values
    parts = (factors.u, factors.v, factors.columns, sparse, factors.bias, factors.base)
    if not all(part is None or all_finite(part) for part in parts):
        raise NumericsError(f"layer {layer.name}: its factors are not finite")
    return factors
