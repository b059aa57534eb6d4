"""Stage ``realise``: a decomposition and a share become the factors that will be stored."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compress_core.decompose import LowRank, in_eight_bits
from compress_core.errors import CompressError, NumericsError
from compress_core.learn.base import pick
from compress_core.refine.base import DENSE, Moments
from compress_core.refine.columns import index_cost
from compress_core.sparse import Sparse
from compress_core.types import LayerRef, Share, affordable
from tasks.engine.components import code_of, describe
from tasks.engine.cost import EXACT, Cost
from tasks.engine.job import Job, reader
from tasks.engine.units import Group, Unit, Work
from tasks.stages.allocate import share_of, view_of
from tasks.stages.arrays import (
    get_atoms,
    get_chosen,
    get_factors,
    get_prefix_stats,
    get_stats,
    put_factors,
)

DENSE_ATTRS = {"rank": None, "columns": 0, "nonzeros": 0}


@dataclass(frozen=True)
class Upstream:
    """What layers are made of.

    Attributes:
        collected: Tap to its ``collect`` unit.
        decomposed: Stack to its ``decompose`` unit; empty where nothing is decomposed.
        allocation: The ``allocate`` unit, or what was learned, by layer, in its place.
    """

    collected: Mapping[str, Unit]
    decomposed: Mapping[str, Unit]
    allocation: Unit | Mapping[str, Unit]


def realise_groups(job: Job, upstream: Upstream) -> list[Group]:
    """One group per block, one unit per layer, for methods that need no compressed prefix."""
    compute = Realise(job, upstream.allocation)
    return [
        Group(
            "realise",
            f"block {block}",
            [realise_unit(job, layer, upstream, {}) for layer in layers],
            compute,
        )
        for block in range(len(job.model.layout.blocks))
        if (layers := job.model.layout.of_block(block))
    ]


def realise_unit(
    job: Job, layer: LayerRef, upstream: Upstream, measured: Mapping[str, Unit]
) -> Unit:
    """The unit of one layer; a layer that stays dense stores nothing.

    Args:
        job: Gives the method.
        layer: The layer.
        upstream: What it is made of.
        measured: Tap to its ``measure`` unit, for methods that read the compressed prefix.
    """
    model, method = job.model, job.method
    stack = job.stack_of[layer.name]
    rows = job.rows(layer)
    settings = {
        "dtype": model.checkpoint.dtype(model.weight_key(layer.name)),
        "rows": [rows.start, rows.stop],
        "owner": owner_of(job, layer) == layer.name,
    }
    inputs, views, sources = {}, {}, {}
    if stack in upstream.decomposed:
        inputs["decomposition"] = upstream.decomposed[stack]
    if isinstance(upstream.allocation, Unit):
        views["share"] = (upstream.allocation, view_of(stack))
    else:
        inputs["learned"] = upstream.allocation[layer.name]
    if method.eight_bits:
        settings["bits"] = 8
    fitted = method.refine or method.prune
    if fitted is not None:
        settings |= {"fit": describe(fitted), "transposed": layer.transposed}
        sources["weight"] = model.stored[model.weight_key(layer.name)]
        if DENSE in fitted.reads:
            inputs["statistics"] = upstream.collected[layer.tap]
        if method.sequential:
            inputs["prefix"] = measured[layer.tap]
    numbers = affordable(job.kept, layer.dense_cost)
    small = min(layer.out_features, layer.in_features)
    return Unit(
        "realise",
        layer.name,
        settings=settings,
        code=[
            *([] if method.prune else [code_of(method.decompose)]),
            *([code_of(fitted)] if fitted is not None else []),
            *(["compress_core.learn.base.pick"] if method.learn else []),
            *(["compress_core.decompose.in_eight_bits"] if method.eight_bits else []),
        ],
        sources=sources,
        inputs=inputs,
        views=views,
        cost=Cost(
            products={} if fitted is None else {EXACT: 40.0 * small**2 * layer.in_features},
            memory=8 * numbers,
            disk=4 * numbers,
        ),
    )


def owner_of(job: Job, layer: LayerRef) -> str:
    """The layer under whose name the in-factor is stored: the first of the stack."""
    return job.stacks[job.stack_of[layer.name]].members[0].name


class Realise:
    """Cuts or prunes, refines and stores the layers of a group."""

    def __init__(self, job: Job, allocation: Unit | Mapping[str, Unit]) -> None:
        self.job = job
        self.allocation = allocation
        self.layers = {layer.name: layer for layer in job.model.layout.layers}

    def __call__(self, work: Work) -> None:
        """Computes the missing units of a group."""
        for done, unit in enumerate(work.missing):
            layer = self.layers[unit.name]
            factors = self._factors(work, unit, layer)
            own = owner_of(self.job, layer) == layer.name
            with work.draft(unit) as draft:
                if factors is None:
                    draft.attrs |= DENSE_ATTRS | {"numbers": layer.dense_cost}
                    continue
                dtype = self.job.model.checkpoint.torch_dtype(self.job.model.weight_key(layer.name))
                if self.job.method.eight_bits:
                    factors = in_eight_bits(factors, dtype)
                put_factors(draft, factors, dtype, own_v=own)
                draft.attrs |= count(factors, own)
            work.progress(done + 1, len(work.missing))

    def _factors(self, work: Work, unit: Unit, layer: LayerRef) -> LowRank | None:
        """What the layer stores; None where it stays dense."""
        method = self.job.method
        if not isinstance(self.allocation, Unit):
            factors = self._picked(work, unit, layer)
            if factors is not None:
                _require_finite(layer, factors)
            return factors
        share = share_of(work.artifact(self.allocation), self.job.stack_of[layer.name])
        if share.rank is None:
            return None
        try:
            if method.prune is not None:
                factors = method.prune.prune(self._weight(layer), share, self._moments(work, unit))
            else:
                factors = self._cut(work, unit, layer, share)
        except CompressError as error:
            raise type(error)(f"layer {layer.name}: {error}") from error
        _require_finite(layer, factors)
        return factors

    def _picked(self, work: Work, unit: Unit, layer: LayerRef) -> LowRank | None:
        """What was learned to keep, fitted where the method refines."""
        atoms = get_atoms(work.artifact(unit.inputs["decomposition"]))
        factors = pick(atoms, get_chosen(work.artifact(unit.inputs["learned"])))
        refiner = self.job.method.refine
        if factors is None or refiner is None:
            return factors
        sparse = factors.sparse and Sparse(
            factors.sparse.mask.to(self.job.model.device), self._wide(factors.sparse.values)
        )
        wide = LowRank(self._wide(factors.u), self._wide(factors.v), None, None, sparse)
        try:
            return refiner.refine(self._weight(layer), wide, self._moments(work, unit))
        except CompressError as error:
            raise type(error)(f"layer {layer.name}: {error}") from error

    def _cut(self, work: Work, unit: Unit, layer: LayerRef, share: Share) -> LowRank:
        source = work.artifact(unit.inputs["decomposition"])
        whole = self.job.method.decompose.realise(reader(source), share)
        factors = LowRank(whole.u[self.job.rows(layer)].contiguous(), whole.v)
        refiner = self.job.method.refine
        if refiner is None:
            return factors
        wide = LowRank(self._wide(factors.u), self._wide(factors.v))
        return refiner.refine(self._weight(layer), wide, self._moments(work, unit))

    def _weight(self, layer: LayerRef) -> Tensor:
        return self._wide(self.job.weight(layer))

    def _wide(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.job.model.device, torch.float64)

    def _moments(self, work: Work, unit: Unit) -> Moments:
        dense = prefix = cross = None
        if "statistics" in unit.inputs:
            stats = get_stats(work.artifact(unit.inputs["statistics"]))
            dense = self._wide(stats.gram / stats.tokens)
        if "prefix" in unit.inputs:
            behind = get_prefix_stats(work.artifact(unit.inputs["prefix"]))
            prefix = self._wide(behind.gram / behind.tokens)
            cross = self._wide(behind.cross / behind.tokens)
        return Moments(dense, prefix, cross)


def _require_finite(layer: LayerRef, factors: LowRank) -> None:
    sparse = None if factors.sparse is None else factors.sparse.values
    given = (factors.u, factors.v, factors.columns, sparse, factors.bias)
    parts = [part for part in given if part is not None]
    if not all(bool(part.isfinite().all()) for part in parts):
        raise NumericsError(f"layer {layer.name}: its factors are not finite")


def count(factors: LowRank, own: bool) -> dict[str, int]:
    """Rank, kept columns, sparse entries, and numbers stored.

    In-factors count where they are ``own``, the index of a column as a number, the place of a
    sparse entry not at all, as in the papers: it is in the bytes. Of factors in 8 bits two codes
    count as one number, and a scale as one.
    """
    numbers = factors.u.numel() + (factors.v.numel() if own else 0)
    if factors.codes is not None:
        numbers = factors.codes.numbers
    columns = 0 if factors.index is None else len(factors.index)
    entries = 0 if factors.sparse is None else factors.sparse.nonzeros
    numbers += entries + (0 if factors.bias is None else factors.bias.numel())
    if factors.columns is not None:
        features = factors.v.shape[1] + columns
        numbers += factors.columns.numel() + columns * index_cost(features)
    return {
        "rank": factors.rank,
        "columns": columns,
        "nonzeros": entries,
        "numbers": numbers,
    }


def read_factors(
    work: Work, job: Job, realised: Mapping[str, Unit], layer: LayerRef
) -> LowRank | None:
    """The stored factors of a layer; None for one that stays dense."""
    artifact = work.artifact(realised[layer.name])
    if artifact.attrs["rank"] is None:
        return None
    owner = owner_of(job, layer)
    return get_factors(artifact, work.artifact(realised[owner]))
