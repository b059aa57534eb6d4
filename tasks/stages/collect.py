"""Stage ``collect``: statistics of every linear's input on the dense model, block by block.

Hidden states between blocks are scratch: only the latest are kept, so that an interrupted run goes
on at its block, and the last ones are removed when the stage is done.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from compress_core.errors import NumericsError
from compress_core.finite import first_bad
from compress_core.hf.stream import BlockStream
from compress_core.stats import CosineAccumulator
from storage.keys import recipe_key
from tasks.engine.code import fingerprint
from tasks.engine.cost import (
    MODEL,
    Cost,
    add,
    block_numbers,
    block_operations,
    outer_numbers,
    streamed_bytes,
)
from tasks.engine.dense_model import DenseModel
from tasks.engine.job import Job
from tasks.engine.session import Session
from tasks.engine.units import Unit
from tasks.engine.work import Group, Work
from tasks.stages.arrays import get_tensor, put
from tasks.stages.scratch import SCRATCH, discard, keep, load


def collect_groups(job: Job, calibration: Unit) -> list[Group]:
    """One group per block: one unit per tap that is read, and one for the block as a whole.

    Args:
        job: What is done to which model.
        calibration: The unit whose artifact holds the token windows.
    """
    model, layout = job.model, job.model.layout
    earlier = _earlier_weights(model)
    groups = []
    for block in range(len(layout.blocks)):
        sources = {
            "architecture": model.config_digest,
            "weights outside blocks": model.state_digest(
                layout.outer_parameters, layout.outer_buffers
            ),
            "weights of earlier blocks": earlier[block],
            "weights of the block": block_digest(model, block),
        }
        units = [
            Unit(
                "collect",
                tap,
                settings={"products": job.products, "dtype": model.compute_dtype, "input of": tap},
                code=[BlockStream],
                sources=sources,
                inputs={"calibration tokens": calibration},
                cost=_cost(job, block, layers[0].in_features),
            )
            for tap, layers in (layout.taps(block) if job.method.reads_inputs else {}).items()
        ]
        similarity = Unit(
            "collect",
            layout.blocks[block],
            settings={"dtype": model.compute_dtype, "cosine of": layout.blocks[block]},
            code=[BlockStream],
            sources=sources,
            inputs={"calibration tokens": calibration},
            cost=_cost(job, block),
        )
        compute = _Collect(job, calibration, block, earlier)
        last = block == len(layout.blocks) - 1
        after = compute.tidy if last else None
        groups.append(
            Group(
                "collect",
                f"block {block}",
                [*units, similarity],
                compute,
                after,
                strand="hidden states",
            )
        )
    return groups


def block_digest(model: DenseModel, block: int) -> str:
    """Content of a block's parameters and buffers."""
    layout = model.layout
    return model.state_digest(layout.block_parameters[block], layout.block_buffers[block])


def _earlier_weights(model: DenseModel) -> list[str]:
    """What decides the hidden states that enter each block, the last of all included."""
    before = [""]
    for block in range(len(model.layout.blocks)):
        before.append(recipe_key({"earlier": before[-1], "block": block_digest(model, block)}))
    return before


def _cost(job: Job, block: int, features: int = 0) -> Cost:
    """Of a tap, or of the cosine, which has no features; the block's units share its forward."""
    tokens = job.samples * job.length
    taps = job.model.layout.taps(block) if job.method.reads_inputs else {}
    forward = block_operations(job.model, block, tokens, job.length) / (len(taps) + 1)
    sums = sum(8 * layers[0].in_features ** 2 for layers in taps.values())
    return Cost(
        products=add({MODEL: forward}, {job.products: 2.0 * tokens * features**2}),
        held=block_numbers(job.model, block) + outer_numbers(job.model),
        # Of all taps: the Grams, and one batch's products or the finished ones.
        memory=2 * sums + streamed_bytes(job.model, tokens, 1, job.batch_size * job.length),
        disk=4 * features * (features + 1),
    )


def _watch(path: str, cosine: CosineAccumulator) -> Callable[[Tensor, Tensor], None]:
    """Adds what enters and leaves a block, which must be finite."""

    def watch(before: Tensor, after: Tensor) -> None:
        bad = first_bad(after)
        if bad is not None:
            sample = cosine.tokens // after.shape[1] + bad
            raise NumericsError(f"{path}: output is not finite at calibration sample {sample}")
        cosine.add(before.to(after.device), after)

    return watch


class _Collect:
    """Measures one block; leaves the hidden states for the next one."""

    def __init__(self, job: Job, calibration: Unit, block: int, earlier: list[str]) -> None:
        self.job = job
        self.model = job.model
        self.calibration = calibration
        self.block = block
        self.earlier = earlier

    def __call__(self, work: Work) -> None:
        tokens = get_tensor(work.artifact(self.calibration), "tokens")
        recipe = work.recipes[work.missing[0]]
        hidden = self._enter(work, tokens, recipe)
        path = self.model.layout.blocks[self.block]
        cosine = CosineAccumulator()
        wanted = {unit.name: unit for unit in work.missing}
        measured = self.model.stream.run_block(
            self.block,
            hidden,
            self.job.batch_size,
            taps=[name for name in wanted if name != path],
            products=getattr(torch, self.job.products),
            progress=work.progress,
            watch=_watch(path, cosine) if path in wanted else None,
        )
        for name, unit in wanted.items():
            with work.draft(unit) as draft:
                if name == path:
                    draft.attrs["cosine"] = cosine.finish()
                else:
                    put(draft, measured[name].pack())
        self._leave(work, hidden, recipe)

    def tidy(self, session: Session, recipe: Mapping[str, Any]) -> None:
        """Removes the hidden states that this block and those before it entered with."""
        if self.block == len(self.earlier) - 2:  # the last one: its weights outside blocks can go
            self.model.__dict__.pop("stream", None)
        for block in range(1, self.block + 1):
            discard(session.store, self._scratch_recipe(recipe, block))

    def _scratch_recipe(self, recipe: Mapping[str, Any], block: int) -> dict[str, Any]:
        """Of the hidden states that enter ``block``: like a tap's, but for all weights before."""
        sources = {k: v for k, v in recipe["sources"].items() if k != "weights of the block"}
        return {
            "stage": SCRATCH,
            "settings": {"dtype": self.model.compute_dtype, "block": block},
            "sources": sources | {"weights of earlier blocks": self.earlier[block]},
            "inputs": recipe["inputs"],
            "code": fingerprint([BlockStream]),
        }

    def _enter(self, work: Work, tokens: Tensor, recipe: Mapping[str, Any]) -> Tensor:
        """Hidden states that enter the block: the latest kept ones, carried on from there."""
        stream, batch_size = self.model.stream, self.job.batch_size
        stream.prepare(tokens, batch_size)
        for start in range(self.block, 0, -1):
            kept = load(work.session.store, self._scratch_recipe(recipe, start), "hidden")
            if kept is not None:
                hidden = kept[0]
                break
        else:
            start, hidden = 0, stream.embed(tokens, batch_size)
        for block in range(start, self.block):
            stream.run_block(block, hidden, batch_size)
        return hidden

    def _leave(self, work: Work, hidden: Tensor, recipe: Mapping[str, Any]) -> None:
        if self.block == len(self.model.layout.blocks) - 1:
            return  # `tidy` follows
        following = self.block + 1
        name = f"hidden states into block {following}"
        keep(work.session.store, self._scratch_recipe(recipe, following), name, {"hidden": hidden})
        self.tidy(work.session, recipe)
