"""Stage ``collect``: statistics of every linear's input on the dense model, block by block.

Hidden states between blocks are scratch: only the latest are kept, so that an interrupted run goes
on at its block, and the last ones are removed when the stage is done.
"""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from storage.errors import ArtifactMissingError
from storage.keys import recipe_key
from storage.store import Store
from tasks.convert import get_tensor, put_stats, put_tensor
from tasks.model import DenseModel
from tasks.units import Cost, Group, Session, Unit, Work

CODE = ("compress_core.stats.InputAccumulator", "compress_core.hf.stream.BlockStream")
SCRATCH = "scratch"


def collect_groups(
    model: DenseModel,
    calibration: Unit,
    *,
    products: str,
    batch_size: int,
    samples: int,
    length: int,
) -> list[Group]:
    """One group per block, one unit per tap.

    Args:
        model: The dense model.
        calibration: The unit whose artifact holds the token windows.
        products: Dtype of one batch's products, "float64" or "float32".
        batch_size: Samples per forward; changes rounding at most, so it is not in the key.
        samples: Windows, for the estimate.
        length: Tokens per window, for the estimate.
    """
    layout = model.layout
    outer = model.state_digest(layout.outer_parameters, layout.outer_buffers)
    blocks = [
        model.state_digest(*names)
        for names in zip(layout.block_parameters, layout.block_buffers, strict=True)
    ]
    before = [""]  # what decides the hidden states that enter each block
    for own in blocks:
        before.append(recipe_key({"earlier": before[-1], "block": own}))
    groups = []
    tokens = samples * length
    for block, names in enumerate(layout.block_parameters):
        units = []
        weights = sum(model.numbers(model.checkpoint.key(n, layout.base_prefix)) for n in names)
        for tap, layers in layout.taps(block).items():
            features = layers[0].in_features
            units.append(
                Unit(
                    "collect",
                    tap,
                    settings={"products": products, "dtype": layout.dtype, "input of": tap},
                    code=CODE,
                    sources={
                        "architecture": model.config_digest,
                        "weights outside blocks": outer,
                        "weights of earlier blocks": before[block],
                        "weights of the block": blocks[block],
                    },
                    inputs={"calibration tokens": calibration},
                    cost=Cost(
                        operations=2.0 * tokens * features**2
                        + 2.0 * tokens * weights / len(layout.taps(block)),
                        memory=8 * features**2 + 4 * weights,
                        disk=4 * features * (features + 1),
                    ),
                )
            )
        compute = _Collect(model, calibration, block, before, products, batch_size)
        last = block == len(blocks) - 1
        groups.append(
            Group("collect", f"block {block}", units, compute, compute.tidy if last else None)
        )
    return groups


class _Collect:
    """Measures one block; leaves the hidden states for the next one."""

    def __init__(
        self,
        model: DenseModel,
        calibration: Unit,
        block: int,
        before: list[str],
        products: str,
        batch_size: int,
    ) -> None:
        self.model = model
        self.calibration = calibration
        self.block = block
        self.before = before
        self.products = products
        self.batch_size = batch_size

    def __call__(self, work: Work) -> None:
        tokens = get_tensor(work.artifact(self.calibration), "tokens")
        recipe = work.recipes[work.missing[0]]
        hidden = self._enter(work, tokens, recipe)
        measured = self.model.stream.run_block(
            self.block,
            hidden,
            self.batch_size,
            taps=[unit.name for unit in work.missing],
            products=getattr(torch, self.products),
            progress=work.progress,
        )
        for unit in work.missing:
            with work.draft(unit) as draft:
                put_stats(draft, measured[unit.name])
        self._leave(work, hidden, recipe)

    def tidy(self, session: Session, recipe: Mapping[str, Any]) -> None:
        """Removes the hidden states that this block and those before it entered with."""
        if self.block == len(self.before) - 2:  # the last one: its weights outside blocks can go
            self.model.__dict__.pop("stream", None)
        for block in range(1, self.block + 1):
            _discard(session.store, recipe_key(self._scratch_recipe(recipe, block)))

    def _scratch_recipe(self, recipe: Mapping[str, Any], block: int) -> dict[str, Any]:
        """Of the hidden states that enter ``block``: like a tap's, but for all weights before."""
        sources = {k: v for k, v in recipe["sources"].items() if k != "weights of the block"}
        return {
            **recipe,
            "stage": SCRATCH,
            "settings": {"dtype": self.model.layout.dtype, "block": block},
            "sources": sources | {"weights of earlier blocks": self.before[block]},
        }

    def _enter(self, work: Work, tokens: Tensor, recipe: Mapping[str, Any]) -> Tensor:
        """Hidden states that enter the block: the latest kept ones, carried on from there."""
        stream = self.model.stream
        stream.prepare(tokens, self.batch_size)
        start, hidden = 0, None
        for block in range(self.block, 0, -1):
            hidden = self._kept(work, recipe_key(self._scratch_recipe(recipe, block)))
            if hidden is not None:
                start = block
                break
        if hidden is None:
            hidden = stream.embed(tokens, self.batch_size)
        for block in range(start, self.block):
            stream.run_block(block, hidden, self.batch_size)
        return hidden

    def _kept(self, work: Work, key: str) -> Tensor | None:
        if work.session.store.find(key, SCRATCH) is None:
            return None
        try:
            return get_tensor(work.session.store.open(key, SCRATCH), "hidden").clone()
        except ArtifactMissingError:  # another process finished with it in the meantime
            return None

    def _leave(self, work: Work, hidden: Tensor, recipe: Mapping[str, Any]) -> None:
        if self.block == len(self.model.layout.blocks) - 1:
            return  # `tidy` follows
        scratch = self._scratch_recipe(recipe, self.block + 1)
        store, key = work.session.store, recipe_key(scratch)
        if store.find(key, SCRATCH) is None:
            name = f"hidden states into block {self.block + 1}"
            with store.draft(key=key, stage=SCRATCH, unit=name, recipe=scratch, inputs={}) as draft:
                put_tensor(draft, "hidden", hidden)
        self.tidy(work.session, recipe)


def _discard(store: Store, key: str) -> None:
    with suppress(ArtifactMissingError):  # it was never needed, or another process removed it
        store.remove(key)
