"""Stage ``predict``: the KL divergence that every rank of a layer is predicted to leave.

It reads what allocators never do, factors and second moments, and leaves a number per rank. For
allocators that choose widths of codes it also leaves what rounding costs: of the weight, and of the
product at every rank; for those that choose entries or columns, what keeping only some costs.
"""

from collections.abc import Mapping

import torch

from compress_core.allocate.base import Curvature
from compress_core.coding.expected import Inputs, costs_of_codes
from compress_core.coding.expected_columns import costs_of_columns
from compress_core.coding.expected_entries import LEVELS, costs_of_entries
from compress_core.curvature import OutputFisher, divergence_by_rank
from compress_core.errors import NumericsError
from compress_core.finite import all_finite
from compress_core.layer.make import rows_of
from compress_core.stats import InputStats
from compress_core.types import LayerRef, Share, Stack
from tasks.engine.cost import EXACT, Cost
from tasks.engine.job import Job
from tasks.engine.units import Unit
from tasks.engine.work import Group, Work
from tasks.stages.arrays import Stored, dense_weight_of, get_tensor, put_tensor

PREDICTED, CODES, ENTRIES, COLUMNS = "predicted", "codes", "entries", "columns"


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
        decomposed: Stack name to its ``decompose`` unit; empty for methods that cut nothing.
        outputs: Layer name to the unit of its output gradients.
    """
    curvature = job.method.allocate.probe(job.kept)
    if not isinstance(curvature, Curvature):
        return []
    by_block: dict[int, list[Unit]] = {}
    for name, stack in job.stacks.items():
        inputs = {"decomposition": decomposed[name]} if decomposed else {}
        for i, member in enumerate(stack.members):
            inputs |= {f"inputs {i}": collected[member.tap], f"outputs {i}": outputs[member.name]}
        unit = _unit(job, curvature, name, stack, inputs)
        by_block.setdefault(stack.as_layer.block, []).append(unit)
    compute = _Predict(job, curvature)
    return [
        Group("predict", f"block {block}", units, compute)
        for block, units in sorted(by_block.items())
    ]


def _unit(job: Job, curvature: Curvature, name: str, stack: Stack, inputs: dict[str, Unit]) -> Unit:
    model, members = job.model, stack.members
    codes = {"form": stack.form, "group": stack.as_layer.group} if curvature.codes else {}
    asked = {ENTRIES: curvature.entries, COLUMNS: curvature.columns}
    chosen = {name: True for name, given in asked.items() if given}
    widest = max(member.out_features for member in members)
    into = members[0].in_features
    matrices = 12 if curvature.entries else 6  # of its size; a sweep holds some per share
    return Unit(
        "predict",
        name,
        settings={"damp": curvature.damp, "transposed": members[0].transposed, **codes, **chosen},
        code=[job.method.decompose] if "decomposition" in inputs else [],
        sources={
            f"weight {i}": model.stored[model.weight_key(member.name)]
            for i, member in enumerate(members)
        },
        inputs=inputs,
        cost=Cost(
            products={EXACT: sum(_operations(x, curvature) for x in members)},
            # H, and what is factored of it; of columns H⁻¹ and what is left of that, too.
            memory=8 * (3 * widest**2 + 4 * into**2 + matrices * widest * into)
            + (16 * into**2 if curvature.columns else 0),
            disk=8 * (stack.as_layer.paying_rank + 1 + 2 * LEVELS * len(chosen)),
        ),
    )


def _operations(layer: LayerRef, curvature: Curvature) -> float:
    """G E H; G and H between all pairs of components, and between these and the rest; u v.

    Of columns H inverted and brought up to date as they go, and W and G W with it.
    """
    out, into, rank = layer.out_features, layer.in_features, layer.paying_rank
    products = out * out * (into + rank) + into * into * (out + rank)
    products += rank * rank * (out + into) + 2 * rank * out * into
    if curvature.columns:
        products += 2 * into**3 + into * into * out + out * out * into
    return 2.0 * products


class _Predict:
    def __init__(self, job: Job, curvature: Curvature) -> None:
        self.job = job
        self.curvature = curvature

    def __call__(self, work: Work) -> None:
        taps = _Taps(work, self.job.model.device)
        for done, unit in enumerate(work.missing):
            stack = self.job.stacks[unit.name]
            parts = [self._of_member(taps, unit, stack, i) for i in range(len(stack.members))]
            curves = {name: sum(part[name] for part in parts) for name in parts[0]}
            with work.draft(unit) as draft:
                for name, curve in curves.items():
                    assert isinstance(curve, torch.Tensor)
                    if not all_finite(curve):
                        raise NumericsError(f"layer {unit.name}: what is {name} is not finite")
                    put_tensor(draft, name, curve)
            work.progress(done + 1, len(work.missing))

    def _of_member(
        self, taps: "_Taps", unit: Unit, stack: Stack, index: int
    ) -> dict[str, torch.Tensor]:
        """The curves of one layer of a stack, by its own rows, inputs and gradients."""
        layer, work, device = stack.members[index], taps.work, taps.device
        inputs = taps.read(unit.inputs[f"inputs {index}"])
        outputs = OutputFisher.unpack(Stored(work.artifact(unit.inputs[f"outputs {index}"])))
        fisher = outputs.damped(self.curvature.damp).to(device)
        weight = dense_weight_of(self.job, layer).to(device)
        factors = self._factors(work, unit, stack, layer)
        found = {}
        if factors is not None:
            found[PREDICTED] = divergence_by_rank(weight, *factors, inputs.moment, fisher).cpu()
        w, group = weight.to(torch.float64), stack.as_layer.group
        if self.curvature.codes:
            u, v = (part.to(torch.float64) for part in factors or (w[:, :0], w[:0]))
            found[CODES] = costs_of_codes(w, u, v, inputs, fisher, stack.form, group)
        if self.curvature.entries:
            found[ENTRIES] = costs_of_entries(w, inputs, fisher, group)
        if self.curvature.columns:
            found[COLUMNS] = costs_of_columns(w, inputs, fisher, group)
        return found

    def _factors(
        self, work: Work, unit: Unit, stack: Stack, layer: LayerRef
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A layer's own factors of full rank; None where nothing is decomposed."""
        decomposer, device = self.job.method.decompose, self.job.model.device
        if decomposer is None:
            return None
        record = Stored(work.artifact(unit.inputs["decomposition"]))
        ranks = len(get_tensor(record.artifact, "loss")) - 1
        whole = decomposer.realise(record.tensor, Share(ranks))
        return whole.u[rows_of(stack, layer)].to(device), whole.v.to(device)


class _Taps:
    """Reads inputs of layers; those of one tap follow one another, and it is read once."""

    def __init__(self, work: Work, device: str) -> None:
        self.work, self.device = work, device
        self.last: tuple[Unit, Inputs] | None = None

    def read(self, source: Unit) -> Inputs:
        """What a ``collect`` unit measured."""
        if self.last is None or self.last[0] is not source:
            stats = InputStats.unpack(Stored(self.work.artifact(source)))
            self.last = source, Inputs(stats.moment.to(self.device))
        return self.last[1]
