"""Stage ``recover``, block by block: each is trained before the next one reads what it gives out.

It works on the folder that ``materialise`` wrote, of whatever method, and writes it again with what
came out. The hidden states of both models are carried along in memory; a run that was stopped makes
them again, in two forwards per block, and goes on at its block.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from compress_core.folder.replace import write_replaced
from compress_core.folder.stream import FolderStream
from compress_core.recover.blocks import recover_block
from compress_core.recover.recovery import Recovered
from compress_core.recover.settings import Recovery
from storage.artifact import Artifact
from tasks.engine.components import describe
from tasks.engine.cost import (
    MODEL,
    Cost,
    block_numbers,
    block_operations,
    outer_numbers,
    streamed_bytes,
)
from tasks.engine.dense_model import FOLDER
from tasks.engine.job import Job
from tasks.engine.session import Session
from tasks.engine.units import Unit
from tasks.engine.work import Group, Work
from tasks.stages.arrays import get_tensor, put_tensor
from tasks.stages.checkpoints import clear_checkpoints
from tasks.stages.recover import STATE_BYTES, TENSOR
from tasks.stages.teacher import training_of

OF_BLOCK = "block_"  # what names of curves begin with, beside those of the whole model's recovery


def block_groups(
    job: Job, recovery: Recovery, calibration: Unit, materialised: Unit
) -> tuple[list[Group], Unit]:
    """A training per block, and the folder with what came out.

    Args:
        job: What is done to which model.
        recovery: How; every block is trained as long as a whole model would be.
        calibration: The unit whose artifact holds the token windows.
        materialised: The unit whose folder is trained on.

    Returns:
        The groups, and the unit of the new folder.

    Raises:
        ConfigError: Settings out of range, or too few calibration windows.
    """
    recovery = replace(recovery, how="factors", text=0.0)  # no text is predicted
    recovery.check(job.samples)
    blocks = _Blocks(job, recovery, calibration, materialised)
    last = len(job.model.layout.blocks) - 1
    groups = [
        Group(
            "recover",
            f"block {block}",
            [blocks.unit(block)],
            blocks,
            blocks.finish if block == last else clear_checkpoints,
            strand="blocks in training",
        )
        for block in range(last + 1)
    ]
    written = Unit(
        "materialise",
        "model of recovered blocks",
        settings={},
        inputs={"compressed model": materialised, **_by_block(blocks.units)},
        cost=Cost(disk=materialised.cost.disk),
    )
    write = _Write(blocks.units, materialised)
    return [*groups, Group("materialise", "recovered blocks", [written], write)], written


class _Blocks:
    """Trains the blocks in order, between the hidden states of both models."""

    def __init__(self, job: Job, recovery: Recovery, calibration: Unit, materialised: Unit) -> None:
        self.job = job
        self.recovery = recovery
        self.calibration = calibration
        self.materialised = materialised
        self.units: list[Unit] = []
        self._stream: FolderStream | None = None
        self._held: tuple[list[str], Tensor, Tensor] | None = None  # keys of what led here

    def unit(self, block: int) -> Unit:
        """The training of the next block; it depends on what every earlier one came to."""
        job, recovery = self.job, self.recovery
        model = job.model
        step = 3 * block_operations(model, block, recovery.batch * job.length, job.length)
        passed = 2 * job.samples + recovery.watched(job.samples)  # both models' states, and checks
        carried = block_operations(model, block, passed * job.length, job.length)
        numbers = block_numbers(model, block)
        unit = Unit(
            "recover",
            model.layout.blocks[block],
            settings={**describe(recovery), "block": block, "dtype": model.compute_dtype},
            sources={"model": model.digest},
            inputs={
                "compressed model": self.materialised,
                "calibration tokens": self.calibration,
                **_by_block(self.units),
            },
            cost=Cost(
                products={MODEL: recovery.all_steps * step + carried},
                held=2 * numbers + outer_numbers(model),
                memory=int(STATE_BYTES * job.share * numbers)
                + streamed_bytes(model, job.samples * job.length, 2, recovery.batch * job.length),
                disk=int(job.share * model.nbytes * numbers / model.parameters),
            ),
        )
        self.units.append(unit)
        return unit

    def __call__(self, work: Work) -> None:
        """Trains a block, keeps what it then stores, and carries the hidden states through it."""
        (unit,) = work.missing
        job, block = self.job, self.units.index(unit)
        stream = self._open(work)
        dense, hidden = self._enter(work, stream, block)
        self._held = None  # they are changed in place from here on
        stream.run_block(block, dense, job.batch_size)
        training = training_of(job, work, self.calibration, self.recovery.batch)
        with stream.loaded_compressed(block) as module:
            states = hidden, dense
            found = recover_block(stream, block, module, self.recovery, states, training)
            stream.advance(block, hidden, job.batch_size)
        with work.draft(unit) as draft:
            draft.attrs["report"] = dict(found.report)
            for name, tensor in found.tensors.items():
                put_tensor(draft, TENSOR + name, tensor)
            for name, curve in _curves(found).items():
                put_tensor(draft, OF_BLOCK + name, curve)
        self._held = self._keys(work, block + 1), dense, hidden

    def finish(self, session: Session, recipe: Mapping[str, Any]) -> None:
        """Forgets what only the next block would need, when there is none."""
        self._stream = self._held = None
        clear_checkpoints(session, recipe)

    def _open(self, work: Work) -> FolderStream:
        """Both models, ready to run in the job's batches."""
        model = self.job.model
        if self._stream is None:
            self._stream = FolderStream(
                model.checkpoint,
                model.layout,
                work.artifact(self.materialised).file(FOLDER),
                model.device,
                model.trust_remote_code,
                model.compute_dtype,
                model.room,
            )
        self._stream.prepare(self._tokens(work), self.job.batch_size)
        return self._stream

    def _enter(self, work: Work, stream: FolderStream, block: int) -> tuple[Tensor, Tensor]:
        """Both hidden states that enter a block: those held, or made again."""
        if self._held is not None and self._held[0] == self._keys(work, block):
            return self._held[1:]
        size = self.job.batch_size
        dense = stream.embed(self._tokens(work), size)
        hidden = stream.room.copy(dense)
        for earlier, unit in enumerate(self.units[:block]):
            stream.run_block(earlier, dense, size)
            with stream.loaded_compressed(earlier, _tensors(work.artifact(unit))):
                stream.advance(earlier, hidden, size)
        return dense, hidden

    def _keys(self, work: Work, block: int) -> list[str]:
        return [work.session.manifests[unit].key for unit in self.units[:block]]

    def _tokens(self, work: Work) -> Tensor:
        return get_tensor(work.artifact(self.calibration), "tokens")


def _by_block(units: list[Unit]) -> dict[str, Unit]:
    return {f"block {block}": unit for block, unit in enumerate(units)}


def _curves(found: Recovered) -> dict[str, Tensor]:
    """Those of the training, and the held-back error before and after as a step of the model's."""
    report = {name: found.report.get(name, torch.nan) for name in ("start", "best")}
    one = {name: torch.tensor([value], dtype=torch.float64) for name, value in report.items()}
    return {**found.curves, **one}


def _tensors(artifact: Artifact) -> dict[str, Tensor]:
    """Key in the folder to what came out, of one block."""
    names = [name for name in artifact.names if name.startswith(TENSOR)]
    return {name.removeprefix(TENSOR): get_tensor(artifact, name) for name in names}


class _Write:
    """The folder again with what came out of all blocks."""

    def __init__(self, units: list[Unit], materialised: Unit) -> None:
        self.units = units
        self.materialised = materialised

    def __call__(self, work: Work) -> None:
        before = work.artifact(self.materialised)
        places = {
            array.removeprefix(TENSOR): work.artifact(unit)
            for unit in self.units
            for array in work.artifact(unit).names
            if array.startswith(TENSOR)
        }

        def read(key: str) -> Tensor:
            return get_tensor(places[key], TENSOR + key)

        with work.draft(work.missing[0]) as draft:
            write_replaced(before.file(FOLDER), draft.add_file(FOLDER), places, read)
            draft.attrs |= before.attrs
