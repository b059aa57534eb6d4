"""A method applied to layers in memory: the core's own steps, with no store between them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress_core.coding.expected import Inputs, costs_of_codes
from compress_core.coding.expected_columns import costs_of_columns
from compress_core.coding.expected_entries import costs_of_entries
from compress_core.coding.parts import CodedParts
from compress_core.curvature import divergence_by_rank
from compress_core.decompose import LowRank, Prepared, ReadRows
from compress_core.forms.names import FULL, GROUP, PLAIN
from compress_core.layer.make import (
    Given,
    code_share,
    decompose_stack,
    pack_prepared,
    realise_share,
)
from compress_core.layer.stored import pack_layer
from compress_core.method import Method
from compress_core.metric import Metric, summed_fisher
from compress_core.stats import InputAccumulator, InputStats, PrefixAccumulator, PrefixStats
from compress_core.types import LayerRef, Share, Stack


@dataclass(frozen=True)
class Seen:
    """A layer's weight and what it reads.

    Attributes:
        weight: (out, in), float64.
        dense: Its inputs in the dense model, (tokens, in), float64.
        behind: The same tokens behind compressed layers.
        fisher: Fisher information of its columns, (in,).
    """

    weight: Tensor
    dense: Tensor
    behind: Tensor
    fisher: Tensor


def first_rows(prepared: Prepared) -> ReadRows:
    """Reads a decomposition from memory, as the store would from disk."""
    return pack_prepared(prepared).tensor


def as_stack(stack: Sequence[Seen]) -> Stack:
    """The layers as the core names them."""
    return Stack(
        tuple(
            LayerRef(f"layer {place}", 0, len(layer.weight), layer.weight.shape[1], f"tap {place}")
            for place, layer in enumerate(stack)
        )
    )


def input_stats(layer: Seen) -> InputStats:
    """What is measured at its input in the dense model."""
    accumulator = InputAccumulator(layer.dense.shape[1])
    accumulator.add(layer.dense[None])
    return accumulator.finish()


def prefix_stats(layer: Seen) -> PrefixStats:
    """The same behind compressed layers."""
    accumulator = PrefixAccumulator(layer.dense.shape[1])
    accumulator.add(layer.dense[None], layer.behind[None])
    return accumulator.finish()


def metric_of(method: Method, stack: Sequence[Seen]) -> Metric:
    """The metric of a stack of layers: that of their summed statistics."""
    if "fisher" in method.weighting.needs:
        return method.weighting.metric(summed_fisher([layer.fisher for layer in stack]))
    return method.weighting.metric(InputStats.summed([input_stats(layer) for layer in stack]))


def prepare(method: Method, stack: Sequence[Seen], rank: int) -> Prepared:
    """The decomposition of a stack of layers."""
    assert method.decompose is not None
    weights = [layer.weight for layer in stack]
    return decompose_stack(
        method.decompose, as_stack(stack), weights, metric_of(method, stack), rank
    )


def evidence_of(method: Method, seen: Seen, prepared: Prepared | None) -> dict[str, Tensor]:
    """What is predicted of a layer all of whose outputs count alike, by field of Evidence."""
    moment, fisher = input_stats(seen).moment, torch.eye(len(seen.weight), dtype=torch.float64)
    u, v, inputs = seen.weight[:, :0], seen.weight[:0], Inputs(moment)
    if prepared is not None:
        u, v = prepared.arrays["ut"].T.double(), prepared.arrays["v"].double()
    return {
        "predicted": divergence_by_rank(seen.weight, u, v, moment, fisher),
        "codes": costs_of_codes(seen.weight, u, v, inputs, fisher, method.form, GROUP),
        "entries": costs_of_entries(seen.weight, inputs, fisher, GROUP),
        "columns": costs_of_columns(seen.weight, inputs, fisher, GROUP),
    }


def realise(
    method: Method, stack: Sequence[Seen], prepared: Prepared | None, share: Share
) -> list[LowRank]:
    """What every layer of a stack stands for, in float64."""
    made = make(method, stack, prepared, share)
    return [found.low if isinstance(found, CodedParts) else found for found in made]


def make(
    method: Method, stack: Sequence[Seen], prepared: Prepared | None, share: Share
) -> list[LowRank | CodedParts]:
    """What every layer of a stack stores, in float64."""
    names, found = as_stack(stack), list[LowRank | CodedParts]()
    for layer, seen in zip(names.members, stack, strict=True):
        given = Given(
            layer,
            names,
            weight=lambda seen=seen: seen.weight,  # type: ignore[misc]
            decomposition=None if prepared is None else pack_prepared(prepared),
            dense=input_stats(seen),
            behind=prefix_stats(seen),
        )
        makers = method.entries, method.columns
        low = realise_share(method.decompose, method.fit, given, share, *makers)
        assert low is not None
        if method.coding is not None and share.bits not in (None, FULL):
            coded = code_share(method.coding, given, low, share, method.form, torch.float64)
            found.append(coded)
        else:
            found.append(replace(low, u=low.u.double(), v=low.v.double()))
    return found


def numbers_of(members: Sequence[LowRank | CodedParts], form: str = PLAIN) -> int:
    """Numbers stored for a stack: its in-factor once."""
    packed = [
        pack_layer(low, torch.float64, 0, own=not place, form=form)
        for place, low in enumerate(members)
    ]
    return sum(stored.attrs["numbers"] for stored in packed)


def output_error(layer: Seen, low: LowRank) -> float:
    """Squared error per token of the output on the dense model's inputs."""
    error = layer.dense @ (low.dense() - layer.weight).T
    return float(error.square().sum()) / len(layer.dense)
