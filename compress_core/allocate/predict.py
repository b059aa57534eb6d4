"""What an allocation is predicted to cost, from losses and tables alone: no model is run."""

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from compress_core.allocate.base import Evidence
from compress_core.allocate.hull import sensitivity
from compress_core.coding.expected import steps_squared
from compress_core.coding.expected_entries import level_counts
from compress_core.types import Allocation, LayerRef, Share


def predicted_error(
    layers: Sequence[LayerRef], losses: Mapping[str, Tensor], shares: Allocation
) -> float:
    """The part of all squared error there could be that an allocation leaves, in [0, 1].

    A cut to rank r leaves exactly loss(r) in the metric that the layer was decomposed in
    (Eckart-Young), and loss(0) is all of it: Σ loss(r) / Σ loss(0). A dense layer leaves none.

    Args:
        layers: What is cut.
        losses: Layer to its squared error left at every rank, (ranks + 1,).
        shares: Layer to what it keeps.
    """
    whole = math.fsum(float(losses[layer.name][0]) for layer in layers)
    left = summed(layers, losses, shares)
    return left / whole if whole > 0 else 0.0


def predicted_divergence(
    layers: Sequence[LayerRef],
    losses: Mapping[str, Tensor],
    divergence: Mapping[str, Sequence[float]],
    probed: float,
    shares: Allocation,
) -> float:
    """KL to the dense model, nats per token, as ``hull`` predicts it: Σ sensitivity · loss(rank).

    Args:
        layers: What is cut.
        losses: Layer to its squared error left at every rank, (ranks + 1,).
        divergence: Layer to the KL of the model with that layer alone cut to ``probed``.
        probed: That share, in (0, 1).
        shares: Layer to what it keeps.
    """
    return math.fsum(
        sensitivity(layer, losses[layer.name], divergence[layer.name][0], probed)
        * _left(losses[layer.name], shares[layer.name].rank)
        for layer in layers
    )


def summed(layers: Sequence[LayerRef], curves: Mapping[str, Tensor], shares: Allocation) -> float:
    """What curves say that an allocation leaves, layer by layer, added up; dense layers: nothing.

    Args:
        layers: What is cut.
        curves: Layer to what every rank leaves, (ranks + 1,).
        shares: Layer to what it keeps.
    """
    return math.fsum(_left(curves[layer.name], shares[layer.name].rank) for layer in layers)


def rounded(layers: Sequence[LayerRef], evidence: Evidence, shares: Allocation) -> float:
    """The same where layers may be of other than components: what a cut leaves and rounding adds.

    Args:
        layers: What is cut and rounded.
        evidence: What is predicted of them.
        shares: Layer to what it keeps.
    """
    return math.fsum(left_by(x, evidence)(shares[x.name]) for x in layers)


def left_by(layer: LayerRef, evidence: Evidence) -> Callable[[Share], float]:
    """What a share of a layer is predicted to cost, in nats per token.

    Args:
        layer: The layer.
        evidence: "codes", "predicted" for shares that have a rank, "entries" and "columns" for
            such as have some of these, which are of a level.
    """
    whole, *products = evidence.codes[layer.name].tolist()
    cuts = evidence.predicted[layer.name].tolist() if layer.name in evidence.predicted else []
    levels = level_counts(layer.out_features * layer.in_features)
    entries = evidence.entries[layer.name].tolist() if layer.name in evidence.entries else []
    of_inputs = level_counts(layer.in_features)
    columns = evidence.columns[layer.name].tolist() if layer.name in evidence.columns else []

    def left(share: Share) -> float:
        cut, kappa = 0.0, whole
        if share.nonzeros:
            cut, kappa = entries[levels.index(share.nonzeros)]
        elif share.columns:
            cut, kappa = columns[of_inputs.index(share.columns)]
        elif share.rank is not None:
            cut, kappa = cuts[share.rank], products[share.rank]
        return float(cut + kappa / steps_squared(share.bits or layer.bits))

    return left


def _left(loss: Tensor, rank: int | None) -> float:
    return 0.0 if rank is None else float(loss[rank])
