"""Stage ``recover``: the compressed model is trained on, and its folder written with the result.

It works on the folder that ``materialise`` wrote, of whatever method: numbers change, their count
does not. The dense model's predictions (stage ``teacher``) are those that every training reads.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from compress_core.folder.replace import write_replaced
from compress_core.hf.checkpoint import Checkpoint
from compress_core.hf.loading import load_model
from compress_core.recover.parts import stored_tensors
from compress_core.recover.recovery import Recovered, recover
from compress_core.recover.settings import Recovery
from tasks.engine.components import describe
from tasks.engine.cost import MODEL, Cost, add, forward_operations, logits
from tasks.engine.dense_model import FOLDER
from tasks.engine.descent import descent
from tasks.engine.job import Job
from tasks.engine.units import Unit
from tasks.engine.whole_models import LOADING, Models
from tasks.engine.work import Group, Work
from tasks.stages.arrays import get_tensor, put_tensor
from tasks.stages.checkpoints import clear_checkpoints
from tasks.stages.teacher import read_teacher, teacher_group, training_of

STATE_BYTES = 16  # of a number that is trained: its leaf, two moments and the best state, float32
TENSOR = "tensor."  # what the arrays of trained tensors are called, beside those of the curves


def recover_groups(
    job: Job, models: Models, recovery: Recovery, calibration: Unit, materialised: Unit
) -> tuple[list[Group], Unit]:
    """The teacher, the training, and the folder with what came out.

    Args:
        job: What is done to which model.
        models: Loads the dense model whole.
        recovery: How the compressed model is trained.
        calibration: The unit whose artifact holds the token windows.
        materialised: The unit whose folder is trained on.

    Returns:
        The groups, and the unit of the new folder.

    Raises:
        ConfigError: Settings out of range, or too few calibration windows.
    """
    recovery.check(job.samples)
    taught = teacher_group(job, models, calibration)
    (teacher,) = taught.units
    trained = _unit(job, recovery, calibration, teacher, materialised)
    compute = _Recover(job, recovery, calibration, teacher, materialised)
    written = _folder_group(job, trained, materialised)
    training = Group("recover", recovery.how, [trained], compute, clear_checkpoints)
    return [taught, training, written], written.units[0]


def _unit(
    job: Job, recovery: Recovery, calibration: Unit, teacher: Unit, materialised: Unit
) -> Unit:
    model = job.model
    tokens, watched = recovery.batch * job.length, recovery.watched(job.samples) * job.length
    layers = sum(layer.dense_cost for layer in model.layout.layers)
    passed = descent(model, recovery.all_steps * tokens, tokens, job.length, softmaxes=2)
    watching = {MODEL: forward_operations(model, watched, job.length)}
    return Unit(
        "recover",
        recovery.how,
        settings={**describe(recovery), "dtype": model.compute_dtype},
        code=LOADING,
        inputs={
            "compressed model": materialised,
            "calibration tokens": calibration,
            "teacher": teacher,
        },
        cost=replace(
            passed,
            products=add(passed.products, watching),
            logits=passed.logits + 2 * logits(model, watched),
            held=2 * model.parameters,  # with gradients
            memory=passed.memory + int(STATE_BYTES * job.share * layers),
            disk=int(job.share * model.nbytes),
        ),
    )


class _Recover:
    def __init__(
        self, job: Job, recovery: Recovery, calibration: Unit, teacher: Unit, materialised: Unit
    ) -> None:
        self.job = job
        self.recovery = recovery
        self.calibration = calibration
        self.teacher = teacher
        self.materialised = materialised

    def __call__(self, work: Work) -> None:
        """Trains, and keeps what the compressed layers then store."""
        job, recovery = self.job, self.recovery
        folder = work.artifact(self.materialised).file(FOLDER)
        model = load_model(
            folder,
            job.model.device,
            trust_remote_code=job.model.trust_remote_code,
            dtype=job.model.compute_dtype,
        )
        training = training_of(job, work, self.calibration, recovery.batch)
        found = recover(
            model,
            job.model.layout,
            recovery,
            read_teacher(work, self.teacher),
            training,
            _dtypes(job, folder, model),
        )
        _keep(work, found)


def _dtypes(job: Job, folder: Path, model: nn.Module) -> dict[str, torch.dtype]:
    """Name of a stored tensor to the dtype of its file; the model may run in another one."""
    checkpoint = Checkpoint(folder, compressed=True)
    return {
        stored.name: checkpoint.torch_dtype(job.model.stem(stored.layer) + stored.part)
        for stored in stored_tensors(model)
    }


def _keep(work: Work, found: Recovered) -> None:
    (unit,) = work.missing
    with work.draft(unit) as draft:
        draft.attrs["report"] = dict(found.report)
        for name, tensor in found.tensors.items():
            put_tensor(draft, TENSOR + name, tensor)
        for name, curve in found.curves.items():
            put_tensor(draft, name, curve)


def _folder_group(job: Job, trained: Unit, materialised: Unit) -> Group:
    """The folder of ``materialised`` with the trained tensors in it."""
    model = job.model
    stems = {layer.name: model.stem(layer.name) for layer in model.layout.layers}
    unit = Unit(
        "materialise",
        "recovered model",
        settings={"keys": stems},
        inputs={"compressed model": materialised, "trained": trained},
        cost=Cost(disk=materialised.cost.disk),
    )
    return Group("materialise", "recovered model", [unit], _Replace(stems, trained, materialised))


class _Replace:
    def __init__(self, stems: Mapping[str, str], trained: Unit, materialised: Unit) -> None:
        self.stems = stems
        self.trained = trained
        self.materialised = materialised

    def __call__(self, work: Work) -> None:
        artifact, before = work.artifact(self.trained), work.artifact(self.materialised)
        arrays = {}
        for array in artifact.names:
            if array.startswith(TENSOR):
                layer, _, part = array.removeprefix(TENSOR).rpartition(".")
                arrays[self.stems[layer] + part] = array

        def read(key: str) -> Tensor:
            return get_tensor(artifact, arrays[key])

        with work.draft(work.missing[0]) as draft:
            write_replaced(before.file(FOLDER), draft.add_file(FOLDER), arrays, read)
            draft.attrs |= before.attrs
