"""Stage ``predict``: the KL divergence that every rank of a layer is predicted to leave.

It reads what allocators never do, factors and second moments, and leaves a number per rank.
"""

from collections.abc import Mapping

import torch

from compress_core.allocate.base import Curvature
from compress_core.curvature import OutputFisher, divergence_by_rank
from compress_core.errors import NumericsError
from compress_core.layer.make import rows_of
from compress_core.stats import InputStats
from compress_core.types import LayerRef, Share, Stack
from tasks.engine.cost import EXACT, Cost
from tasks.engine.job import Job
from tasks.engine.session import Group, Work
from tasks.engine.units import Unit
from tasks.stages.arrays import Stored, dense_weight_of, get_tensor, put_tensor

PREDICTED = "predicted"


def predict_groups(
    job: Job,
    collected: Mapping[str, Unit],
    decomposed: Mapping[str, Unit],
    outputs: Mapping[str, Unit],
) -> list[Group]:
    """One group per block, one unit per layer or stack; none unless the allocator reads curves.

    Args:
        job: Gives allocator, decomposer and stacks.
        collected: Tap name to its ``collect`` unit.
        decomposed: Stack name to its ``decompose`` unit.
        outputs: Layer name to the unit of its output gradients.
    """
    curvature = job.method.allocate.probe(job.kept)
    if not isinstance(curvature, Curvature):
        return []
    by_block: dict[int, list[Unit]] = {}
    for name, stack in job.stacks.items():
        inputs = {"decomposition": decomposed[name]}
        for i, member in enumerate(stack.members):
            inputs |= {f"inputs {i}": collected[member.tap], f"outputs {i}": outputs[member.name]}
        unit = _unit(job, curvature.damp, name, stack, inputs)
        by_block.setdefault(stack.as_layer.block, []).append(unit)
    compute = _Predict(job)
    return [
        Group("predict", f"block {block}", units, compute)
        for block, units in sorted(by_block.items())
    ]


def _unit(job: Job, damp: float, name: str, stack: Stack, inputs: dict[str, Unit]) -> Unit:
    model, members = job.model, stack.members
    widest = max(member.out_features for member in members)
    into = members[0].in_features
    return Unit(
        "predict",
        name,
        settings={"damp": damp, "transposed": members[0].transposed},
        code=[job.method.decompose],
        sources={
            f"weight {i}": model.stored[model.weight_key(member.name)]
            for i, member in enumerate(members)
        },
        inputs=inputs,
        cost=Cost(
            products={EXACT: sum(map(_operations, members))},
            memory=8 * (2 * widest**2 + 3 * into**2 + 6 * widest * into),
            disk=8 * (stack.as_layer.paying_rank + 1),
        ),
    )


def _operations(layer: LayerRef) -> float:
    """G E H; G and H between all pairs of components, and between these and the rest; u v."""
    out, into, rank = layer.out_features, layer.in_features, layer.paying_rank
    products = out * out * (into + rank) + into * into * (out + rank)
    return 2.0 * (products + rank * rank * (out + into) + 2 * rank * out * into)


class _Predict:
    def __init__(self, job: Job) -> None:
        self.job = job

    def __call__(self, work: Work) -> None:
        for done, unit in enumerate(work.missing):
            stack = self.job.stacks[unit.name]
            curve = sum(self._of_member(work, unit, stack, i) for i in range(len(stack.members)))
            assert isinstance(curve, torch.Tensor)
            if not bool(torch.isfinite(curve).all()):
                raise NumericsError(f"layer {unit.name}: its predicted divergences are not finite")
            with work.draft(unit) as draft:
                put_tensor(draft, PREDICTED, curve)
            work.progress(done + 1, len(work.missing))

    def _of_member(self, work: Work, unit: Unit, stack: Stack, index: int) -> torch.Tensor:
        """The part of one layer of a stack, by its own rows, inputs and gradients."""
        decomposer, device = self.job.method.decompose, self.job.model.device
        assert decomposer is not None
        record = Stored(work.artifact(unit.inputs["decomposition"]))
        ranks = len(get_tensor(record.artifact, "loss")) - 1
        whole = decomposer.realise(record.tensor, Share(ranks))
        layer = stack.members[index]
        inputs = InputStats.unpack(Stored(work.artifact(unit.inputs[f"inputs {index}"])))
        outputs = OutputFisher.unpack(Stored(work.artifact(unit.inputs[f"outputs {index}"])))
        return divergence_by_rank(
            dense_weight_of(self.job, layer).to(device),
            whole.u[rows_of(stack, layer)].to(device),
            whole.v.to(device),
            inputs.moment.to(device),
            outputs.damped(unit.settings["damp"]).to(device),
        ).cpu()
