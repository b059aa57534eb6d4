"""Stages ``measure``, ``realise`` and ``advance`` in turn: inputs behind compressed layers.

Block b is measured on the model whose earlier blocks (and, step by step, whose own earlier layers)
are compressed already; the dense model runs beside it. What ``advance`` leaves is a digest of the
hidden states, so keys chain from block to block and a run that was stopped goes on at its block.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compress_core.hf.prefix import PairAccumulator, PrefixStream
from compress_core.hf.stream import BlockStream
from compress_core.stats import PrefixAccumulator, StackOfBatch, buckets_of
from compress_core.types import LayerRef
from tasks.engine.cost import (
    MODEL,
    Cost,
    add,
    block_numbers,
    block_operations,
    outer_numbers,
    streamed_bytes,
)
from tasks.engine.job import Job
from tasks.engine.session import Session
from tasks.engine.units import Unit
from tasks.engine.work import Group, Work
from tasks.stages.arrays import get_tensor, put
from tasks.stages.collect import block_digest
from tasks.stages.realise import Upstream, make_realise, read_weight, realise_unit
from tasks.stages.scratch import SCRATCH, discard, keep, load

LINE = "sequential"


def sequential_groups(
    job: Job,
    calibration: Unit,
    upstream: Upstream,
) -> list[Group]:
    """Per block: measure and realise, step by step, then advance.

    Args:
        job: Gives the method, whose ``prefix`` says how finely inputs are measured again.
        calibration: The unit whose artifact holds the token windows.
        upstream: What layers are made of.
    """
    prefix = _Prefix(job, calibration)
    realise = make_realise(job, upstream.allocation)
    make_group = partial(Group, line=LINE, strand="hidden states of both models")
    groups: list[Group] = []
    layout = job.model.layout
    for block in range(len(layout.blocks)):
        for step in _steps(job, block):
            measured = {tap: prefix.measure_unit(block, tap, step[tap]) for tap in step}
            label = f"block {block} {_leaf(step)}"
            groups.append(make_group("measure", label, list(measured.values()), prefix))
            layers = [layer for of_tap in step.values() for layer in of_tap]
            for layer in layers:
                prefix.realised[layer.name] = realise_unit(job, layer, upstream, measured)
            units = [prefix.realised[layer.name] for layer in layers]
            groups.append(make_group("realise", label, units, realise))
        last = block == len(layout.blocks) - 1
        groups.append(
            make_group(
                "advance",
                f"block {block}",
                [prefix.advance_unit(block)],
                prefix.advance,
                prefix.tidy if last else None,
            )
        )
    return groups


def _steps(job: Job, block: int) -> list[dict[str, tuple[LayerRef, ...]]]:
    """Taps that are measured together, in order, with the layers that read them."""
    taps = job.model.layout.taps(block)
    if job.method.prefix.step == "block":
        return [taps] if taps else []
    return [{tap: layers} for tap, layers in taps.items()]


def _leaf(step: Mapping[str, Any]) -> str:
    return "" if len(step) > 1 else next(iter(step)).rpartition(".")[2]


class _Prefix:
    """The two models' hidden states, carried from block to block."""

    def __init__(self, job: Job, calibration: Unit) -> None:
        self.job = job
        self.calibration = calibration
        self.realised: dict[str, Unit] = {}
        self.advanced: list[Unit] = []
        self._held: tuple[str, Tensor, Tensor] | None = None  # key of what led here, and the states

    def measure_unit(self, block: int, tap: str, layers: Sequence[LayerRef]) -> Unit:
        """Statistics of one tap behind everything realised so far."""
        job, prefix, features = self.job, self.job.method.prefix, layers[0].in_features
        stacked = {"buckets": prefix.buckets, "seed": job.seed} if prefix.buckets else {}
        inputs, sources = self._behind(block)
        tokens = job.samples * job.length
        forward = block_operations(job.model, block, tokens, job.length)
        return Unit(
            "measure",
            tap,
            settings={
                "products": job.products,
                "dtype": job.model.compute_dtype,
                "input of": tap,
                **stacked,
            },
            code=[BlockStream],
            sources=sources,
            inputs=inputs,
            cost=Cost(  # both models' blocks, the Gram and the cross products
                products=add({MODEL: 2 * forward}, {job.products: 4.0 * tokens * features**2}),
                held=2 * (block_numbers(job.model, block) + outer_numbers(job.model)),
                memory=16 * features**2
                + streamed_bytes(job.model, tokens, 2, job.batch_size * job.length),
                disk=12 * features**2,
            ),
        )

    def advance_unit(self, block: int) -> Unit:
        """Both models' hidden states behind a block, by digest."""
        inputs, sources = self._behind(block)
        tokens = self.job.samples * self.job.length
        forward = block_operations(self.job.model, block, tokens, self.job.length)
        unit = Unit(
            "advance",
            self.job.model.layout.blocks[block],
            settings={"dtype": self.job.model.compute_dtype},
            code=[BlockStream],
            sources=sources,
            inputs=inputs,
            cost=Cost(
                products={MODEL: 2 * forward},
                held=2 * (block_numbers(self.job.model, block) + outer_numbers(self.job.model)),
                memory=streamed_bytes(
                    self.job.model, tokens, 2, self.job.batch_size * self.job.length
                ),
            ),
        )
        self.advanced.append(unit)
        return unit

    def _behind(self, block: int) -> tuple[dict[str, Unit], dict[str, str]]:
        """What decides what a layer reads: the states that enter the block, and its weights."""
        model, layout = self.job.model, self.job.model.layout
        sources = {
            "architecture": model.config_digest,
            "weights of the block": block_digest(model, block),
        }
        inputs = {"calibration tokens": self.calibration}
        if block == 0:
            sources["weights outside blocks"] = model.state_digest(
                layout.outer_parameters, layout.outer_buffers
            )
        else:
            inputs["earlier blocks"] = self.advanced[block - 1]
        for layer in layout.of_block(block):
            if layer.name in self.realised:
                inputs[f"compressed {layer.name}"] = self.realised[layer.name]
        return inputs, sources

    def __call__(self, work: Work) -> None:
        """Measures the missing taps of one step."""
        layout = self.job.model.layout
        wanted = {unit.name: unit for unit in work.missing}
        block = next(layer.block for layer in layout.layers if layer.tap in wanted)
        features = {layer.tap: layer.in_features for layer in layout.of_block(block)}
        sums = {tap: self._accumulator(features[tap]) for tap in wanted}
        dense, hidden = self._enter(work, block)
        done = _compressed(work.missing[0])
        self._pair(work).measure(
            block, dense, hidden, self._weights(work, block, done), sums, work.progress
        )
        for tap, unit in wanted.items():
            with work.draft(unit) as draft:
                put(draft, sums[tap].finish().pack())

    def advance(self, work: Work) -> None:
        """Carries the hidden states through a block; the states themselves are scratch."""
        unit = work.missing[0]
        block = self.advanced.index(unit)
        dense, hidden = self._enter(work, block)
        error = self._pair(work).advance(block, dense, hidden, self._weights(work, block))
        with work.draft(unit) as draft:
            draft.attrs |= {"dense": _digest(dense), "compressed": _digest(hidden), "error": error}
        self._held = (work.keys[unit], dense, hidden)
        recipe = _scratch_recipe(work.keys[unit])
        name = f"hidden states behind block {block}"
        keep(work.session.store, recipe, name, {"dense": dense, "compressed": hidden})
        for earlier in self.advanced[:block]:
            self._discard(work.session, earlier)

    def tidy(self, session: Session, recipe: Mapping[str, Any]) -> None:
        """Removes what is left of the hidden states when the last block is done."""
        self._held = None
        self.job.model.__dict__.pop("stream", None)
        for unit in self.advanced:
            self._discard(session, unit)

    def _discard(self, session: Session, unit: Unit) -> None:
        discard(session.store, _scratch_recipe(session.manifests[unit].key))

    def _accumulator(self, features: int) -> PairAccumulator:
        job, device = self.job, self.job.model.device
        if job.method.prefix.buckets:
            places = buckets_of(job.samples, job.method.prefix.buckets, job.seed)
            return StackOfBatch(features, places, device)
        return PrefixAccumulator(features, device, getattr(torch, job.products))

    def _pair(self, work: Work) -> PrefixStream:
        self.job.model.stream.prepare(self._tokens(work), self.job.batch_size)
        return PrefixStream(self.job.model.stream, self.job.batch_size)

    def _tokens(self, work: Work) -> Tensor:
        return get_tensor(work.artifact(self.calibration), "tokens")

    def _enter(self, work: Work, block: int) -> tuple[Tensor, Tensor]:
        """Both hidden states that enter a block: those held, those kept, or made again."""
        keys = [work.session.manifests[unit].key for unit in self.advanced[:block]]
        if self._held is not None and keys and self._held[0] == keys[-1]:
            return self._held[1], self._held[2]
        start, states = 0, None
        for position in range(len(keys), 0, -1):
            recipe = _scratch_recipe(keys[position - 1])
            states = load(work.session.store, recipe, "dense", "compressed")
            if states is not None:
                start = position
                break
        pair = self._pair(work)
        if states is None:
            embedded = self.job.model.stream.embed(self._tokens(work), self.job.batch_size)
            states = [embedded, self.job.model.room.copy(embedded)]
        for position in range(start, block):
            pair.advance(position, states[0], states[1], self._weights(work, position))
        if keys:
            self._held = (keys[-1], states[0], states[1])
        return states[0], states[1]

    def _weights(
        self, work: Work, block: int, names: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Compressed weights of a block's layers, or of those named."""
        weights = {}
        for layer in self.job.model.layout.of_block(block):
            if names is not None and layer.name not in names:
                continue
            weight = read_weight(work, self.job, self.realised, layer)
            if weight is not None:
                weights[layer.name] = weight
        return weights


def _compressed(unit: Unit) -> list[str]:
    """The layers of its own block that a unit is measured behind."""
    return [up.name for role, up in unit.inputs.items() if role.startswith("compressed ")]


def _scratch_recipe(key: str) -> dict[str, Any]:
    return {"stage": SCRATCH, "settings": {"behind": key}, "sources": {}, "inputs": {}, "code": {}}


def _digest(hidden: Tensor) -> str:
    return hashlib.sha256(hidden.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
