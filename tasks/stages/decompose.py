"""Stage ``decompose``: every layer once, independent of the budget, best components first."""

from collections.abc import Mapping

import torch
from torch import Tensor

from compress_core.errors import CompressError
from compress_core.metric import Metric, Plain
from compress_core.stats import InputStats
from compress_core.types import LayerRef, Stack
from tasks.engine.components import code_of, describe
from tasks.engine.cost import EXACT, Cost
from tasks.engine.job import Job
from tasks.engine.units import Group, Unit, Work
from tasks.stages.arrays import get_metric, get_stats, get_tensor, put_sparse, put_tensor

METRICS = ("Metric", "Plain", "Diagonal", "SecondMoment")


def decompose_groups(
    job: Job,
    collected: Mapping[str, Unit],
    weighed: Mapping[str, Unit],
    fisher: Mapping[str, Unit],
) -> list[Group]:
    """One group per block, one unit per layer or stack of layers.

    Args:
        job: Gives decomposer, weighting and stacks.
        collected: Tap name to its ``collect`` unit.
        weighed: Tap name to its ``weigh`` unit; empty when the metric needs no statistics.
        fisher: Layer name to the unit of its Fisher information; empty where not needed.
    """
    by_block: dict[int, list[Unit]] = {}
    for name, stack in job.stacks.items():
        inputs = _inputs(job, stack, collected, weighed, fisher)
        by_block.setdefault(stack.as_layer.block, []).append(_unit(job, name, stack, inputs))
    return [
        Group("decompose", f"block {block}", units, _Decompose(job))
        for block, units in sorted(by_block.items())
    ]


def _inputs(
    job: Job,
    stack: Stack,
    collected: Mapping[str, Unit],
    weighed: Mapping[str, Unit],
    fisher: Mapping[str, Unit],
) -> dict[str, Unit]:
    weighting, first = job.method.weighting, stack.members[0]
    if "fisher" in weighting.needs:
        return {f"statistics {i}": fisher[x.name] for i, x in enumerate(stack.members)}
    if len(stack.members) > 1 and weighting.needs:  # their sum is nobody's metric but the stack's
        return {f"statistics {i}": collected[x.tap] for i, x in enumerate(stack.members)}
    inputs = {}
    if first.tap in weighed:
        inputs["metric"] = weighed[first.tap]
        if weighting.keeps_gram:
            inputs["statistics"] = collected[first.tap]
    return inputs


def _unit(job: Job, name: str, stack: Stack, inputs: dict[str, Unit]) -> Unit:
    model, method, layer = job.model, job.method, stack.as_layer
    measured = any(role.startswith("statistics") for role in inputs)
    weights = {
        "weight" if len(stack.members) == 1 else f"weight {i}": model.stored[
            model.weight_key(member.name)
        ]
        for i, member in enumerate(stack.members)
    }
    small = min(layer.out_features, layer.in_features)
    rank = small if method.decompose.whole else layer.paying_rank
    return Unit(
        "decompose",
        name,
        settings={
            **describe(method.decompose),
            **({"weighting": describe(method.weighting)} if measured else {}),
            "rank": rank,
            "transposed": stack.members[0].transposed,
        },
        code=[
            code_of(method.decompose),
            *([code_of(method.weighting)] if measured else []),
            *(f"compress_core.metric.{metric}" for metric in METRICS),
        ],
        sources=weights,
        inputs=inputs,
        cost=Cost(
            products={EXACT: _operations(layer, rank, whole="gram" in method.weighting.needs)},
            eigen=float(small**3),
            memory=8 * (3 * layer.dense_cost + layer.in_features**2),
            disk=4 * rank * layer.atom_cost,
        ),
    )


def _operations(layer: LayerRef, rank: int, *, whole: bool) -> float:
    """Of the truncation around its eigendecomposition; the metric is a ``whole`` matrix or not.

    For a wide W: W H, (W H) Wᵀ and Qᵀ W. For a tall one: W = P R, R H Rᵀ, P Q and Qᵀ R.
    """
    out, into = layer.out_features, layer.in_features
    if out <= into:
        return 2.0 * out * into * ((into if whole else 0) + out + rank)
    triangle = 2.0 * into**2 * ((into if whole else 0) + into + rank)
    return triangle + 2.0 * out * into**2 + 4.0 * out * into * rank


class _Decompose:
    def __init__(self, job: Job) -> None:
        self.job = job

    def __call__(self, work: Work) -> None:
        device = self.job.model.device
        metrics: dict[str, Metric] = {}  # layers of one tap share it
        for done, unit in enumerate(work.missing):
            stack = self.job.stacks[unit.name]
            layer = stack.as_layer
            place = unit.name if "fisher" in self.job.method.weighting.needs else layer.tap
            if place not in metrics:
                metrics = {place: self._metric(work, unit).to(device)}
            weight = torch.cat([self.job.weight(member) for member in stack.members])
            try:
                prepared = self.job.method.decompose.prepare(
                    weight.to(device), metrics[place], unit.settings["rank"]
                )
            except CompressError as error:
                raise type(error)(f"layer {layer.name}: {error}") from error
            with work.draft(unit) as draft:
                if prepared.sparse is not None:
                    put_sparse(draft, prepared.sparse, torch.float32)
                for name, tensor in prepared.arrays.items():
                    put_tensor(draft, name, tensor)
                put_tensor(draft, "loss", prepared.loss)
            work.progress(done + 1, len(work.missing))

    def _metric(self, work: Work, unit: Unit) -> Metric:
        statistics = [up for role, up in unit.inputs.items() if role.startswith("statistics")]
        if statistics:
            read = _fisher if "fisher" in self.job.method.weighting.needs else _input_stats
            return self.job.method.weighting.metric(read(work, statistics))
        if "metric" in unit.inputs:
            return get_metric(work.artifact(unit.inputs["metric"]))
        return Plain()


def _fisher(work: Work, units: list[Unit]) -> Tensor:
    return torch.stack([get_tensor(work.artifact(unit), "fisher") for unit in units]).sum(dim=0)


def _input_stats(work: Work, units: list[Unit]) -> InputStats:
    """Statistics of one tap, or of several that belong to one stack, summed token by token."""
    first, *others = [get_stats(work.artifact(unit)) for unit in units]
    for other in others:
        first = InputStats(first.tokens, first.gram + other.gram, first.abs_sum + other.abs_sum)
    return first
