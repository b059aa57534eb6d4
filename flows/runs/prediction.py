"""The curve that cached decompositions predict for budgets at which nothing was run."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from compress_core.allocate.base import Allocator, Evidence, of_price
from compress_core.allocate.hull import Hull
from compress_core.allocate.predict import predicted_divergence, predicted_error, rounded, summed
from compress_core.allocate.stepped import Stepped
from compress_core.allocate.uniform import Uniform
from compress_core.errors import BudgetError, ConfigError
from compress_core.forms.names import EIGHT_BITS
from compress_core.method import Method
from compress_core.methods import build_method
from compress_core.types import Allocation, LayerRef, Share
from flows.report.shown import Floats, Prediction
from flows.settings.config import MADE_BY

GRID = tuple(n / 10 for n in range(2, 10))  # shares at which something is predicted
WITHOUT_ROUNDING = "what rounding to codes adds is not in it"


@dataclass(frozen=True)
class Known:
    """What was measured.

    Attributes:
        losses: Layer or stack to its squared error left at every rank.
        similarity: Block to the cosine of its input and output, of what is there of it.
        divergence: Layer or stack to its row of the probe's table, of what is there of it.
        predicted: Layer or stack to the KL predicted at every rank, of what is there of it.
        codes: Layer or stack to what rounding is predicted to cost, of what is there of it.
        entries: Layer to what keeping some of its entries is predicted to cost, of what is there.
        columns: The same of its columns.
    """

    losses: Mapping[str, Floats]
    similarity: Mapping[int, float]
    divergence: Mapping[str, Sequence[float]]
    predicted: Mapping[str, Floats]
    codes: Mapping[str, Floats]
    entries: Mapping[str, Floats]
    columns: Mapping[str, Floats]


def predict(
    config: Mapping[str, Any], result: Mapping[str, Any], layers: Sequence[LayerRef], known: Known
) -> Prediction | str:
    """What every budget is predicted to cost, or why that cannot be said.

    Args:
        config: The run's.
        result: The run's.
        layers: Every compressible layer.
        known: What the store has.
    """
    try:
        given = config["method"], config["options"], config["allocate"]
        more = (config.get(name, default) for name, default in MADE_BY.items())
        method = build_method(*given, *more)
        stacks = [stack.as_layer for stack in method.stacks(layers)]
    except (ConfigError, KeyError) as error:
        return f"This version of Eigenpress does not know the run's method: {error}."
    if method.form == EIGHT_BITS:
        return "Components in 8 bits cost other than those that are predicted."
    if method.stores_entries:
        return "It stores sparse entries beside components; what they save is not predicted."
    if any(len(known.losses.get(layer.name, ())) <= layer.paying_rank for layer in stacks):
        return "The decompositions on record are not those of the method as it is now."
    allocator, how = _allocator(method, known, [layer.name for layer in stacks])
    evidence = Evidence(
        _tensors(known.losses),
        known.similarity,
        known.divergence,
        config["samples"] * _length(config, result),
        _tensors(known.predicted),
        _tensors(known.codes),
        _tensors(known.entries),
        _tensors(known.columns),
    )
    if leaves_rounding_out(method, allocator):
        how += f"; {WITHOUT_ROUNDING}"
    return _curve(layers, stacks, allocator, how, evidence)


def leaves_rounding_out(method: Method, allocator: Allocator) -> bool:
    """Whether numbers go into codes and what the allocator predicts is of the cut alone."""
    coded = method.coding is not None and bool(method.coding.bits)
    return coded and "codes" not in allocator.reads


def _tensors(arrays: Mapping[str, Floats]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _allocator(method: Method, known: Known, names: Sequence[str]) -> tuple[Allocator, str]:
    """The run's own allocator where what it reads is there for any budget, else uniform shares."""
    own = method.allocate
    if method.learn is not None:
        return Uniform(), "uniform shares; the run itself learned which components stay"
    there = "similarity" not in own.reads or bool(known.similarity)
    if "divergence" in own.reads:
        there = own.probe(0.5) == own.probe(0.6) and set(names) <= set(known.divergence)
    if "predicted" in own.reads:
        there = set(names) <= set(known.predicted)
    for what in ("codes", "entries", "columns"):
        curves: Mapping[str, Floats] = getattr(known, what)
        if what in own.reads:
            there = there and set(names) <= set(curves)
    if not there:
        return Uniform(), "uniform shares; what the run's allocator reads holds for its budget only"
    return own, f"the run's own allocation ({type(_divider(own)).__name__.lower()})"


def _divider(allocator: Allocator) -> Allocator:
    """Who divides the budget, below what only rounds ranks."""
    return allocator.inner if isinstance(allocator, Stepped) else allocator


def _length(config: Mapping[str, Any], result: Mapping[str, Any]) -> int:
    """Tokens in a window, clipped to the context as the evaluation texts were."""
    texts = result["metrics"]["dense"]["texts"].values()
    return min([config["length"], *(text["length"] for text in texts)])


def _curve(
    dense: Sequence[LayerRef],
    layers: Sequence[LayerRef],
    allocator: Allocator,
    how: str,
    evidence: Evidence,
) -> Prediction | str:
    """What ``layers`` are predicted to cost at shares of what they are as ``dense`` weights."""
    shares, error, divergence = [], [], []
    whole = sum(layer.dense_cost for layer in dense)
    for given in divided(dense, layers, allocator, evidence):
        shares.append(sum(given[layer.name].cost(layer) for layer in layers) / whole)
        if not allocator.reads & {"entries", "columns"}:
            error.append(predicted_error(layers, evidence.losses, given))
        if (cost := divergence_of(layers, allocator, evidence, given)) is not None:
            divergence.append(cost)
    if not shares:
        return "No budget that is looked at holds one component of every layer."
    return Prediction(shares, error or None, divergence or None, how)


def divided(
    dense: Sequence[LayerRef],
    layers: Sequence[LayerRef],
    allocator: Allocator,
    evidence: Evidence,
    grid: Sequence[float] = GRID,
) -> Iterator[dict[str, Share]]:
    """What budgets buy, ascending, without those that are too little for this model.

    Args:
        dense: Every compressible layer as it is.
        layers: The same, or stacks of them, as the method prices them.
        allocator: Divides.
        evidence: What it reads.
        grid: Budgets, as shares of ``dense``.
    """
    for kept in sorted({of_price(wanted, dense, layers) for wanted in grid}):
        try:
            allocator.check(layers, kept)
            yield allocator.allocate(layers, kept, evidence)
        except (BudgetError, ConfigError):
            continue


def divergence_of(
    layers: Sequence[LayerRef], allocator: Allocator, evidence: Evidence, given: Allocation
) -> float | None:
    """KL in nats per token that an allocation is predicted to cost; None where nothing says it."""
    if isinstance(hull := _divider(allocator), Hull):
        tables = evidence.losses, evidence.divergence
        return predicted_divergence(layers, *tables, hull.probe_share, given)
    if "codes" in allocator.reads:
        return rounded(layers, evidence, given)
    if "predicted" in allocator.reads:
        return summed(layers, evidence.predicted, given)
    return None
