"""What an allocation is predicted to cost, from losses and tables alone: no model is run."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from compress_core.allocate.hull import sensitivity
from compress_core.coding.expected import steps_squared
from compress_core.types import Allocation, LayerRef


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


def rounded(
    layers: Sequence[LayerRef],
    curves: Mapping[str, Tensor],
    codes: Mapping[str, Tensor],
    shares: Allocation,
) -> float:
    """The same where numbers are in codes: what the cut leaves, and what rounding adds.

    Args:
        layers: What is cut and rounded.
        curves: Layer to what every rank leaves, (ranks + 1,).
        codes: Layer to κ of its weight and of its product at every rank, (ranks + 2,).
        shares: Layer to what it keeps.
    """
    added = (
        float(codes[x.name][0 if (rank := shares[x.name].rank) is None else rank + 1])
        / steps_squared(shares[x.name].bits or x.bits)
        for x in layers
    )
    return summed(layers, curves, shares) + math.fsum(added)


def _left(loss: Tensor, rank: int | None) -> float:
    return 0.0 if rank is None else float(loss[rank])
