"""What stages read, and what it takes, where errors count by a layer's outputs, too."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from compress_core.curvature import OutputFisher
from compress_core.two_sided import Root, TwoSided
from compress_core.types import LayerRef
from tasks.engine.components import describe
from tasks.engine.cost import EXACT, Cost, add
from tasks.engine.job import Job
from tasks.engine.units import Unit
from tasks.engine.work import Work
from tasks.stages.arrays import Stored

GRADIENTS = "output gradients"


def side_inputs(job: Job, layer: LayerRef, outputs: Mapping[str, Unit]) -> dict[str, Unit]:
    """What a unit of a layer reads for that: nothing where the method does not ask for it.

    Args:
        job: Gives the method.
        layer: The layer.
        outputs: Layer name to the unit of its output gradients.
    """
    return {} if job.method.two_sided is None else {GRADIENTS: outputs[layer.name]}


def side_settings(job: Job) -> dict[str, Any]:
    """What is in such a unit's key."""
    two_sided = job.method.two_sided
    return {} if two_sided is None else {"two sided": describe(two_sided)}


def side_cost(job: Job, layer: LayerRef, rank: int, cost: Cost) -> Cost:
    """The cost of a unit with what that adds to it: two factorisations, A W, and A⁻¹ u."""
    if job.method.two_sided is None:
        return cost
    out = layer.out_features
    products = out**2 * (2 * out / 3 + 2 * layer.in_features + rank)
    return replace(
        cost,
        products=add(cost.products, {EXACT: products}),
        memory=cost.memory + 8 * (5 * out**2 + layer.dense_cost),
    )


def read_root(job: Job, work: Work, unit: Unit) -> Root:
    """The A of a unit's layer.

    Raises:
        NumericsError: As :meth:`TwoSided.root`.
    """
    return _two_sided_of(job).root(_read_fisher(work, unit), job.model.device)


def read_lengths(job: Job, work: Work, unit: Unit) -> Tensor:
    """Those of its columns, (out,).

    Raises:
        NumericsError: As :meth:`TwoSided.lengths`.
    """
    return _two_sided_of(job).lengths(_read_fisher(work, unit), job.model.device)


def _two_sided_of(job: Job) -> TwoSided:
    """How the errors of outputs count, in a method that weighs them."""
    assert isinstance(job.method.two_sided, TwoSided)
    return job.method.two_sided


def _read_fisher(work: Work, unit: Unit) -> OutputFisher:
    return OutputFisher.unpack(Stored(work.artifact(unit.inputs[GRADIENTS])))
