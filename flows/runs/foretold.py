"""What budgets of a run are predicted to cost, from tables in the store: its own, and others."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from compress_core.allocate.base import Allocator, Evidence, price_of
from compress_core.allocate.prices import Prices
from compress_core.allocate.widths import Widths
from compress_core.errors import BudgetError
from compress_core.forms.names import FULL
from compress_core.refine.columns import index_cost
from compress_core.types import LayerRef, Share
from flows.runs.forecast import Planner
from flows.runs.pipeline import Pipeline
from flows.runs.prediction import divergence_of, divided, leaves_rounding_out
from storage.artifact import Artifact
from tasks.engine.units import Unit
from tasks.stages.allocate import read_shares
from tasks.stages.arrays import get_tensor
from tasks.stages.predict import CODES, COLUMNS, ENTRIES, PREDICTED

GRID = (0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

# Least and most of KL measured, of what was predicted, where docs/results has both. Up to SEEN the
# KL is noise of the dtype, in part; of ranks by `fisher` none of these rows is in codes.
SEEN = 0.005
PRESS_MISSES = (1.0, 3.5)
FISHER_MISSES = (0.9, 4.1)


@dataclass(frozen=True)
class Foretold:
    """One budget.

    Attributes:
        kept: The part of the dense layers' numbers that is spent on it, places of entries among it.
        bytes: Of the model on disk, about.
        divergence: KL to the dense model, nats per token, as the run's allocator predicts it.
        rounding: Whether what rounding to codes adds, if there are any, is in it.
    """

    kept: float
    bytes: int
    divergence: float
    rounding: bool


def foretold(planner: Planner, pipeline: Pipeline) -> list[Foretold]:
    """Budgets by rising size; none where the allocator reads no curves, or some are not there yet.

    Args:
        planner: Has planned the pipeline, and so knows what is in the store.
        pipeline: A run's.
    """
    job, allocator = pipeline.job, pipeline.job.method.allocate
    evidence = _evidence(pipeline, planner.artifact)
    if evidence is None:
        return []
    model, dense = job.model, job.model.layout.layers
    widths = {
        x.name: model.checkpoint.torch_dtype(model.weight_key(x.name)).itemsize for x in dense
    }
    whole = sum(layer.dense_cost for layer in dense)
    rest = model.nbytes - sum(layer.dense_cost * widths[layer.name] for layer in dense)
    rounding = not leaves_rounding_out(job.method, allocator)
    curve = []
    for given in divided(dense, job.layers, allocator, evidence, GRID):
        divergence = divergence_of(job.layers, allocator, evidence, given)
        assert divergence is not None
        numbers = sum(price_of(layer, given[layer.name]) for layer in job.layers)
        stored = sum(_bytes(x, given[x.name], max(widths.values())) for x in job.layers)
        curve.append(Foretold(numbers / whole, rest + stored, divergence, rounding))
    return curve


def predicted_kl(pipeline: Pipeline, find: Callable[[Unit], Artifact]) -> float | None:
    """What the allocation of a run that is done was predicted to cost, nats per token.

    Args:
        pipeline: The run's.
        find: The artifact of a unit.

    Returns:
        None where the allocator reads no curves.
    """
    evidence, allocation = _evidence(pipeline, find), pipeline.allocation
    if evidence is None or not isinstance(allocation, Unit):
        return None
    job, shares = pipeline.job, read_shares(find(allocation))
    return divergence_of(job.layers, job.method.allocate, evidence, shares)


def passed_over(pipeline: Pipeline, find: Callable[[Unit], Artifact]) -> dict[str, float]:
    """What a price list, in the same room, is predicted to leave with less on it, nats per token.

    That is why the list chose as it did. Nothing where there is no such list.

    Args:
        pipeline: A run's that is done.
        find: The artifact of a unit.
    """
    evidence, job = _evidence(pipeline, find), pipeline.job
    whole = job.method.allocate
    if evidence is None or not isinstance(whole, Prices):
        return {}
    found = {}
    for name, less in _shorter_lists(whole).items():
        try:
            less.check(job.layers, job.kept)
        except BudgetError:
            continue
        shares = less.allocate(job.layers, job.kept, evidence)
        divergence = divergence_of(job.layers, less, evidence, shares)
        assert divergence is not None
        found[name] = divergence
    return found


def _shorter_lists(whole: Prices) -> dict[str, Allocator]:
    """Lists with one kind less than ``whole``, and that of whole weights alone."""
    lists: dict[str, Allocator] = {}
    if whole.entries:
        lists["without entries"] = replace(whole, entries=False)
    if whole.columns:
        lists["without columns"] = replace(whole, columns=False)
    if whole.codes:
        lists["of whole weights in codes alone"] = Widths(mixed=True)
    return lists


def _evidence(pipeline: Pipeline, find: Callable[[Unit], Artifact | None]) -> Evidence | None:
    """The curves that a run's allocator reads; None where it reads none or some are missing."""
    units = [unit for group in pipeline.groups for unit in group.units if unit.stage == "predict"]
    found = {unit.name: find(unit) for unit in units}
    artifacts = {name: artifact for name, artifact in found.items() if artifact is not None}
    if not found or len(artifacts) < len(found):
        return None
    return Evidence(
        predicted=_curves(artifacts, PREDICTED),
        codes=_curves(artifacts, CODES),
        entries=_curves(artifacts, ENTRIES),
        columns=_curves(artifacts, COLUMNS),
    )


def _bytes(layer: LayerRef, share: Share, width: int) -> int:
    """Numbers in no codes take ``width`` bytes each; codes, places and an index as they are."""
    numbers, priced = share.cost(layer), price_of(layer, share)
    coded = (share.bits or layer.bits) != FULL
    wide = numbers - share.columns * index_cost(layer.in_features)
    return wide * (2 if coded else width) + 2 * (priced - wide)


def _curves(artifacts: Mapping[str, Artifact], name: str) -> dict[str, Tensor]:
    return {
        layer: get_tensor(artifact, name)
        for layer, artifact in artifacts.items()
        if name in artifact.names
    }
