"""Stage ``collect``, where errors are weighed by gradients: those at every layer's outputs.

One forward and one backward pass per window serve all layers whose sums fit the memory together; a
model whose sums do not takes a pass for each run of blocks that fits. What is kept belongs to the
dense model: other methods, budgets and dampings read the same, and so do an allocator that predicts
by them and a metric that counts them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from compress_core.allocate.base import Curvature
from compress_core.allocate.fisher import Fisher
from compress_core.hf.output_gradients import output_fisher
from compress_core.types import LayerRef
from tasks.engine.cost import Cost, add
from tasks.engine.descent import descent
from tasks.engine.free_memory import free_memory
from tasks.engine.job import Job
from tasks.engine.units import Unit
from tasks.engine.whole_models import LOADING, Models
from tasks.engine.work import Group, Work
from tasks.stages.arrays import get_tensor, put

OF = "output gradients of"
FREE_PART = 4  # the sums of one pass take this part of the free memory


def output_groups(job: Job, models: Models, calibration: Unit) -> list[Group]:
    """One group per pass, one unit per layer; none unless the method reads gradients.

    Args:
        job: Gives the method.
        models: Loads the dense model whole.
        calibration: The unit whose artifact holds the token windows.
    """
    curvature = _asked(job)
    if curvature is None:
        return []
    windows = min(curvature.windows or job.samples, job.samples)
    compute = _Outputs(job, models, calibration)
    groups = []
    for layers in passes(job.model.layout.layers, free_memory(job.model.device) // FREE_PART):
        cost = _cost(job, windows, layers)
        units = [
            _unit(job, calibration, windows, curvature.labels, layer, cost[layer.name])
            for layer in layers
        ]
        first, last = layers[0].block, layers[-1].block
        blocks = f"block {first}" if first == last else f"blocks {first} to {last}"
        groups.append(Group("collect", f"output gradients of {blocks}", units, compute))
    return groups


def _asked(job: Job) -> Curvature | None:
    """What is read: by the allocator, else as allocator ``fisher`` does by itself."""
    asked = job.method.allocate.probe(job.kept)
    if isinstance(asked, Curvature):
        return asked
    return None if job.method.two_sided is None else Fisher().probe(job.kept)


def by_layer(groups: Iterable[Group]) -> dict[str, Unit]:
    """Layer name to the unit of its output gradients."""
    return {unit.settings[OF]: unit for group in groups for unit in group.units}


def passes(layers: Sequence[LayerRef], limit: int) -> list[list[LayerRef]]:
    """Runs of whole blocks whose float64 sums take ``limit`` bytes at most, or one block each."""
    found: list[list[LayerRef]] = []
    for layer in layers:
        of_block = sum(x.out_features**2 for x in layers if x.block == layer.block)
        begins = not found or found[-1][-1].block != layer.block
        if begins and (not found or _sums(found[-1]) + 8 * of_block > limit):
            found.append([])
        found[-1].append(layer)
    return found


def _sums(layers: Iterable[LayerRef]) -> int:
    """Bytes of the sums of layers."""
    return sum(8 * layer.out_features**2 for layer in layers)


def _unit(
    job: Job, calibration: Unit, windows: int, labels: str, layer: LayerRef, cost: Cost
) -> Unit:
    return Unit(
        "collect",
        f"{OF} {layer.name}",  # a tap may have the layer's own name
        settings={
            OF: layer.name,
            "windows": windows,
            "labels": labels,
            **({"seed": job.seed} if labels == "sampled" else {}),
            "products": job.products,
            "dtype": job.model.compute_dtype,
        },
        code=LOADING,
        sources={"model": job.model.digest},
        inputs={"calibration tokens": calibration},
        cost=cost,
    )


def _cost(job: Job, windows: int, layers: Sequence[LayerRef]) -> Mapping[str, Cost]:
    """Of each layer of one pass: its part of the forward and backward, and its own products."""
    model, tokens = job.model, windows * job.length
    passed = descent(model, tokens, job.length, job.length, weights=False).part(len(layers))
    largest = max(8 * x.out_features**2 for x in layers)
    return {
        layer.name: replace(
            passed,
            products=add(passed.products, {job.products: 2.0 * tokens * layer.out_features**2}),
            held=model.parameters,
            memory=passed.memory + _sums(layers) + 2 * largest,
            disk=2 * layer.out_features * (layer.out_features + 1),
        )
        for layer in layers
    }


class _Outputs:
    def __init__(self, job: Job, models: Models, calibration: Unit) -> None:
        self.job = job
        self.models = models
        self.calibration = calibration

    def __call__(self, work: Work) -> None:
        model = self.job.model
        layers = {layer.name: layer for layer in model.layout.layers}
        first = work.missing[0].settings  # all but the layer is the same for all
        tokens = get_tensor(work.artifact(self.calibration), "tokens")
        found = output_fisher(
            self.models.get(work, None),
            model.layout,
            [layers[unit.settings[OF]] for unit in work.missing],
            tokens[: first["windows"]],
            labels=first["labels"],
            seed=first.get("seed", 0),
            products=getattr(torch, first["products"]),
            device=model.device,
            progress=work.progress,
        )
        for unit in work.missing:
            with work.draft(unit) as draft:
                put(draft, found.pop(unit.settings[OF]).pack())
