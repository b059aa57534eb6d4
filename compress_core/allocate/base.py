"""What every allocator is: a rule that divides one budget, and what it may look at to do so."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from compress_core.errors import BudgetError
from compress_core.sparse import index_bytes
from compress_core.types import LayerRef, Share, affordable, dense_or


@dataclass(frozen=True)
class Probe:
    """A table of KL divergences: the whole model with one layer at each of some shares.

    Attributes:
        base: Share at which all other layers stand; None leaves them dense.
        shares: What the one layer is cut to, each in (0, 1]; 1 is its dense weight.
        windows: Calibration windows on which the divergence is measured.
    """

    base: float | None
    shares: tuple[float, ...]
    windows: int


@dataclass(frozen=True)
class Curvature:
    """A curve per layer: the KL divergence that each rank is predicted to leave, by gradients.

    Attributes:
        windows: Calibration windows of the gradients; 0 for all.
        labels: Whose tokens the loss is of: "sampled" from the model, or the "text"'s own.
        damp: Part of the mean diagonal of the gradients' second moment that is added to it.
        codes: Whether what rounding to codes costs is predicted, too.
        entries: Whether it is also predicted what keeping only some entries costs.
        columns: Whether it is also predicted what keeping only some columns costs.
    """

    windows: int
    labels: str
    damp: float
    codes: bool = False
    entries: bool = False
    columns: bool = False


@dataclass(frozen=True)
class Evidence:
    """What was measured before the budget is divided; an allocator names what it ``reads``.

    Attributes:
        losses: "losses": layer to its squared error left at every rank, float64 (ranks + 1,), in
            the metric that it was decomposed in.
        similarity: "similarity": block to the mean cosine of its input and its output.
        divergence: "divergence": layer to the KL in nats per token above the base's, per share of
            the allocator's probe.
        tokens: Calibration tokens behind the losses.
        predicted: "predicted": layer or stack to the KL in nats per token that every rank is
            predicted to leave, float64 (ranks + 1,).
        codes: "codes": layer to κ, of its weight first and then of its product at every rank,
            float64 (ranks + 2,): codes of b bits are predicted to cost κ / (2^b - 1)² nats.
        entries: "entries": layer to the KL predicted of keeping so many of its entries, and κ of
            these, float64 (levels, 2), at the counts of ``coding.expected_entries``.
        columns: "columns": layer to the KL predicted of keeping so many of its columns, and κ of
            these, float64 (levels, 2), at the counts of ``coding.expected_columns``.
    """

    losses: Mapping[str, Tensor] = field(default_factory=dict)
    similarity: Mapping[int, float] = field(default_factory=dict)
    divergence: Mapping[str, Sequence[float]] = field(default_factory=dict)
    tokens: int = 0
    predicted: Mapping[str, Tensor] = field(default_factory=dict)
    codes: Mapping[str, Tensor] = field(default_factory=dict)
    entries: Mapping[str, Tensor] = field(default_factory=dict)
    columns: Mapping[str, Tensor] = field(default_factory=dict)


class Allocator(Protocol):
    """Divides a budget; never spends more than it was given."""

    @property
    def reads(self) -> frozenset[str]:
        """Fields of Evidence."""
        ...

    def probe(self, kept: float) -> Probe | Curvature | None:
        """The table that it reads, for ``kept`` of the compressible parameters.

        A Probe is read as "divergence", a Curvature as "predicted", and with these as "codes",
        "entries" and "columns".
        """
        ...

    def check(self, layers: Sequence[LayerRef], kept: float) -> None:
        """Refuses what shapes and budget alone show to be impossible, before anything runs.

        Raises:
            BudgetError, ConfigError: It cannot be.
        """
        ...

    def allocate(
        self, layers: Sequence[LayerRef], kept: float, evidence: Evidence
    ) -> dict[str, Share]:
        """Each layer's share.

        Args:
            layers: Every compressible layer.
            kept: In (0, 1], of the compressible parameters.
            evidence: At least what it ``reads``.
        """
        ...


def budget_of(layers: Sequence[LayerRef], kept: float) -> int:
    """Numbers that may be stored."""
    return affordable(kept, sum(layer.dense_cost for layer in layers))


def of_price(kept: float, layers: Sequence[LayerRef], priced: Sequence[LayerRef]) -> float:
    """The same budget as a share of what layers take in the bits that all numbers will have.

    Args:
        kept: Of the dense weights' numbers of 16 bits.
        layers: Those weights.
        priced: The same, or stacks of them, in their bits.

    Returns:
        In (0, 1]: where ``kept`` holds more than all of them, all.
    """
    whole, price = (sum(layer.dense_cost for layer in found) for found in (layers, priced))
    return kept if price == whole else min(1.0, kept * whole / price)


def as_said(kept: float, priced: Sequence[LayerRef]) -> float:
    """The other way of :func:`of_price`: the share of numbers of 16 bits, as people say it."""
    price = sum(layer.dense_cost for layer in priced)
    return kept * price / sum(layer.in_full.dense_cost for layer in priced)


def least_kept(numbers: int, priced: Sequence[LayerRef]) -> float:
    """The least ``kept`` of four digits, as people say it, that holds some numbers; 1 at most."""
    whole = sum(layer.in_full.dense_cost for layer in priced)
    return min(1.0, upwards(numbers / whole))


def upwards(share: float) -> float:
    """A share in four digits that is no less than it, but for rounding."""
    return math.ceil(share * 1e4 - 1e-6) / 1e4


def price_of(layer: LayerRef, share: Share) -> int:
    """Numbers of 16 bits that a share takes the room of: those that it counts as, and places."""
    places = 0
    if share.nonzeros:
        places = index_bytes(layer.out_features, layer.in_features, share.nonzeros)
    return share.cost(layer) + -(-places // 2)


def check_one_component_each(layers: Sequence[LayerRef], kept: float, biases: bool = False) -> None:
    """Refuses a budget that cannot hold one component of every layer.

    Args:
        layers: All of them.
        kept: In (0, 1], of their numbers.
        biases: Whether a layer of factors also stores a bias of its own.

    Raises:
        BudgetError: It cannot; names the smallest budget that can.
    """
    beside = [layer.out_features if biases else 0 for layer in layers]
    least = sum(
        min(layer.atom_cost + more, layer.dense_cost)
        for layer, more in zip(layers, beside, strict=True)
    )
    if least > budget_of(layers, kept):
        raise BudgetError(
            f"kept={as_said(kept, layers):g} cannot hold one component of each of {len(layers)} "
            f"layers; this model needs kept of at least {least_kept(least, layers):.4f}"
        )


def share_at(layer: LayerRef, wanted: float) -> Share:
    """A probed layer at a share: its floored rank, at least one component; dense if that pays."""
    if wanted >= 1:
        return Share(None)
    rank = layer.affordable_rank(affordable(wanted, layer.dense_cost))
    return dense_or(max(1, rank), layer)


def least_rank(layer: LayerRef) -> int | None:
    """One component; None (dense) for a layer too small for any to pay."""
    return 1 if layer.paying_rank >= 1 else None
