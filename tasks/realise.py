"""Stage ``realise``: a decomposition and a share become the factors that will be stored."""

from collections.abc import Mapping

import torch

from compress_core.decompose import LowRank
from compress_core.errors import CompressError, NumericsError
from compress_core.refine.base import DENSE, Moments, Refiner
from compress_core.refine.columns import index_cost
from compress_core.types import LayerRef, Share, affordable
from tasks.allocate import rank_of
from tasks.components import code_of, describe
from tasks.convert import get_factors, get_prefix_stats, get_stats, put_factors
from tasks.job import Job, reader
from tasks.units import Cost, Group, Unit, Work


def realise_groups(
    job: Job, collected: Mapping[str, Unit], decomposed: Mapping[str, Unit], allocation: Unit
) -> list[Group]:
    """One group per block, one unit per layer, for methods that need no compressed prefix."""
    compute = Realise(job, allocation)
    return [
        Group(
            "realise",
            f"block {block}",
            [realise_unit(job, layer, collected, decomposed, allocation, {}) for layer in layers],
            compute,
        )
        for block in range(len(job.model.layout.blocks))
        if (layers := job.model.layout.of_block(block))
    ]


def realise_unit(
    job: Job,
    layer: LayerRef,
    collected: Mapping[str, Unit],
    decomposed: Mapping[str, Unit],
    allocation: Unit,
    measured: Mapping[str, Unit],
) -> Unit:
    """The unit of one layer; a layer that stays dense stores nothing.

    Args:
        job: Gives the method.
        layer: The layer.
        collected: Tap to its ``collect`` unit.
        decomposed: Stack to its ``decompose`` unit.
        allocation: The ``allocate`` unit.
        measured: Tap to its ``measure`` unit, for methods that read the compressed prefix.
    """
    model, method = job.model, job.method
    stack = job.stack_of[layer.name]
    rows = job.rows(layer)
    inputs = {"decomposition": decomposed[stack]}
    settings = {
        "dtype": model.checkpoint.dtype(model.weight_key(layer.name)),
        "rows": [rows.start, rows.stop],
        "owner": owner_of(job, layer) == layer.name,
    }
    sources = {}
    if method.refine is not None:
        settings |= {"refine": describe(method.refine), "transposed": layer.transposed}
        sources["weight"] = model.stored[model.weight_key(layer.name)]
        if DENSE in method.refine.reads:
            inputs["statistics"] = collected[layer.tap]
        if method.sequential:
            inputs["prefix"] = measured[layer.tap]
    numbers = affordable(job.kept, layer.dense_cost)
    small = min(layer.out_features, layer.in_features)
    return Unit(
        "realise",
        layer.name,
        settings=settings,
        code=[code_of(method.decompose), *([code_of(method.refine)] if method.refine else [])],
        sources=sources,
        inputs=inputs,
        views={"rank": (allocation, rank_of(stack))},
        cost=Cost(
            numbers if method.refine is None else 40.0 * small**2 * layer.in_features,
            8 * numbers,
            4 * numbers,
        ),
    )


def owner_of(job: Job, layer: LayerRef) -> str:
    """The layer under whose name the in-factor is stored: the first of the stack."""
    return job.stacks[job.stack_of[layer.name]].members[0].name


class Realise:
    """Cuts, refines and stores the layers of a group."""

    def __init__(self, job: Job, allocation: Unit) -> None:
        self.job = job
        self.allocation = allocation
        self.layers = {layer.name: layer for layer in job.model.layout.layers}

    def __call__(self, work: Work) -> None:
        """Computes the missing units of a group."""
        for done, unit in enumerate(work.missing):
            layer = self.layers[unit.name]
            rank = rank_of(self.job.stack_of[layer.name])(work.artifact(self.allocation))
            factors = None if rank is None else self._factors(work, unit, layer, Share(rank))
            owner = owner_of(self.job, layer)
            with work.draft(unit) as draft:
                draft.attrs |= {"rank": rank, "columns": 0, "numbers": layer.dense_cost}
                if factors is None:
                    continue
                own = owner == layer.name
                dtype = self.job.model.checkpoint.torch_dtype(self.job.model.weight_key(layer.name))
                put_factors(draft, factors, dtype, own_v=own)
                draft.attrs |= count(factors, own)
            work.progress(done + 1, len(work.missing))

    def _factors(self, work: Work, unit: Unit, layer: LayerRef, share: Share) -> LowRank:
        source = work.artifact(unit.inputs["decomposition"])
        whole = self.job.method.decompose.realise(reader(source), share)
        factors = LowRank(whole.u[self.job.rows(layer)].contiguous(), whole.v)
        refiner = self.job.method.refine
        if refiner is None:
            return factors
        try:
            factors = self._refined(work, unit, layer, factors, refiner)
        except CompressError as error:
            raise type(error)(f"layer {layer.name}: {error}") from error
        if not (factors.u.isfinite().all() and factors.v.isfinite().all()):
            raise NumericsError(f"layer {layer.name}: its factors are not finite")
        return factors

    def _refined(
        self, work: Work, unit: Unit, layer: LayerRef, factors: LowRank, refiner: Refiner
    ) -> LowRank:
        device = self.job.model.device

        def wide(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, torch.float64)

        dense = prefix = cross = None
        if "statistics" in unit.inputs:
            stats = get_stats(work.artifact(unit.inputs["statistics"]))
            dense = wide(stats.gram / stats.tokens)
        if "prefix" in unit.inputs:
            behind = get_prefix_stats(work.artifact(unit.inputs["prefix"]))
            prefix, cross = wide(behind.gram / behind.tokens), wide(behind.cross / behind.tokens)
        return refiner.refine(
            wide(self.job.weight(layer)),
            LowRank(wide(factors.u), wide(factors.v)),
            Moments(dense, prefix, cross),
        )


def count(factors: LowRank, own: bool) -> dict[str, int]:
    """Rank, kept columns, and numbers stored: in-factors where they are ``own``, indices too."""
    numbers = factors.u.numel() + (factors.v.numel() if own else 0)
    columns = 0 if factors.index is None else len(factors.index)
    if factors.columns is not None:
        features = factors.v.shape[1] + columns
        numbers += factors.columns.numel() + columns * index_cost(features)
    return {"rank": factors.rank, "columns": columns, "numbers": numbers}


def read_factors(
    work: Work, job: Job, realised: Mapping[str, Unit], layer: LayerRef
) -> LowRank | None:
    """The stored factors of a layer; None for one that stays dense."""
    artifact = work.artifact(realised[layer.name])
    if artifact.attrs["rank"] is None:
        return None
    owner = owner_of(job, layer)
    return get_factors(artifact, work.artifact(realised[owner]))
