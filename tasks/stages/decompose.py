"""Stage ``decompose``: every layer once, independent of the budget, best components first."""

from collections.abc import Mapping
from functools import partial

from compress_core.layer.make import decompose_stack, pack_prepared
from compress_core.metric import Metric, Plain, summed_fisher, unpack_metric
from compress_core.stats import InputStats
from compress_core.two_sided import ProjectTwoSided
from compress_core.types import LayerRef, Stack
from tasks.engine.components import describe
from tasks.engine.cost import EXACT, Cost
from tasks.engine.job import Job
from tasks.engine.units import Unit
from tasks.engine.work import Group, Work
from tasks.stages.arrays import Stored, dense_weight_of, get_tensor, put
from tasks.stages.two_sided import read_root, side_cost, side_inputs, side_settings


def decompose_groups(
    job: Job,
    collected: Mapping[str, Unit],
    weighed: Mapping[str, Unit],
    fisher: Mapping[str, Unit],
    outputs: Mapping[str, Unit],
) -> list[Group]:
    """One group per block, one unit per layer or stack of layers.

    Args:
        job: Gives decomposer, weighting and stacks.
        collected: Tap name to its ``collect`` unit.
        weighed: Tap name to its ``weigh`` unit; empty when the metric needs no statistics.
        fisher: Layer name to the unit of its Fisher information; empty where not needed.
        outputs: Layer name to the unit of its output gradients; empty where not needed.
    """
    if job.method.decompose is None:
        return []
    compute = _Decompose(job) if job.method.two_sided is None else _DecomposeTwoSided(job)
    by_block: dict[int, list[Unit]] = {}
    for name, stack in job.stacks.items():
        inputs = _inputs(job, stack, collected, weighed, fisher)
        inputs |= side_inputs(job, stack.members[0], outputs)
        by_block.setdefault(stack.as_layer.block, []).append(_unit(job, name, stack, inputs))
    return [
        Group("decompose", f"block {block}", units, compute)
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
    model, method, layer = job.model, job.method, stack.as_layer.in_full
    assert method.decompose is not None
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
            **side_settings(job),
            "rank": rank,
            "transposed": stack.members[0].transposed,
        },
        code=[method.decompose, *([method.weighting] if measured else [])],
        sources=weights,
        inputs=inputs,
        cost=side_cost(
            job,
            layer,
            rank,
            Cost(
                products={EXACT: _operations(layer, rank, whole="gram" in method.weighting.needs)},
                eigen=float(small**3),
                memory=8 * (3 * layer.dense_cost + layer.in_features**2),
                disk=4 * rank * layer.atom_cost,
            ),
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
        decomposer, device = self.job.method.decompose, self.job.model.device
        assert decomposer is not None
        metrics: dict[str, Metric] = {}  # layers of one tap share it
        for done, unit in enumerate(work.missing):
            stack = self.job.stacks[unit.name]
            place = unit.name if "fisher" in self.job.method.weighting.needs else stack.as_layer.tap
            if place not in metrics:
                metrics = {place: self._metric(work, unit).to(device)}
            weights = [dense_weight_of(self.job, member) for member in stack.members]
            rank = unit.settings["rank"]
            prepared = decompose_stack(decomposer, stack, weights, metrics[place], rank, device)
            with work.draft(unit) as draft:
                put(draft, pack_prepared(prepared))
            work.progress(done + 1, len(work.missing))

    def _metric(self, work: Work, unit: Unit) -> Metric:
        """The metric of a unit: kept, or made of what several layers of its stack read."""
        weighting = self.job.method.weighting
        parts = [
            work.artifact(up) for role, up in unit.inputs.items() if role.startswith("statistics")
        ]
        if "metric" in unit.inputs:
            gram = InputStats.unpack(Stored(parts[0])) if parts else None
            return unpack_metric(Stored(work.artifact(unit.inputs["metric"])), gram)
        if "fisher" in weighting.needs:
            return weighting.metric(summed_fisher([get_tensor(part, "fisher") for part in parts]))
        if parts:
            stats = [InputStats.unpack(Stored(part)) for part in parts]
            return weighting.metric(InputStats.summed(stats))
        return Plain()


class _DecomposeTwoSided(_Decompose):
    """Layer by layer, since each has gradients of its own."""

    def __call__(self, work: Work) -> None:
        decomposer, device = self.job.method.decompose, self.job.model.device
        assert decomposer is not None
        for done, unit in enumerate(work.missing):
            stack, rank = self.job.stacks[unit.name], unit.settings["rank"]
            root = partial(read_root, self.job, work, unit)
            prepared = decompose_stack(
                ProjectTwoSided(decomposer.whole, root=root),
                stack,
                [dense_weight_of(self.job, stack.members[0])],
                self._metric(work, unit),
                rank,
                device,
            )
            with work.draft(unit) as draft:
                put(draft, pack_prepared(prepared))
            work.progress(done + 1, len(work.missing))
