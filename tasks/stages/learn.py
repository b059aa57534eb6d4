"""Stage ``learn``: a training on the whole model chooses what every layer keeps.

The dense model's logits (stage ``teacher``) and the decompositions do not know the budget: another
budget or seed trains again and computes nothing else.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch

from compress_core.errors import ConfigError
from compress_core.layer.make import read_atoms
from compress_core.learn.base import Assignment, Atoms, Chosen, Learned
from compress_core.learn.items import HELD_BYTES
from compress_core.robust_pca import SOLVED
from compress_core.types import LayerRef
from tasks.engine.components import describe
from tasks.engine.cost import add
from tasks.engine.descent import descent
from tasks.engine.job import Job
from tasks.engine.units import Unit
from tasks.engine.whole_models import LOADING, Models
from tasks.engine.work import Group, Work
from tasks.stages.arrays import Stored, put, put_tensor
from tasks.stages.checkpoints import clear_checkpoints
from tasks.stages.teacher import read_teacher, teacher_group, training_of

CURVES = "curves"
ITEM_BYTES = 20  # of memory per weight, where each may be an entry: scores, masks, two copies


def learn_groups(
    job: Job, models: Models, calibration: Unit, decomposed: Mapping[str, Unit]
) -> tuple[list[Group], dict[str, Unit]]:
    """The teacher, if it is needed, and the training: a unit per layer and one for the curves.

    Args:
        job: Gives the learner.
        models: Loads the dense model whole.
        calibration: The unit whose artifact holds the token windows.
        decomposed: Layer to its ``decompose`` unit.

    Returns:
        The groups, and layer to the unit that says what it keeps.
    """
    learner = job.method.learn
    assert learner is not None
    groups, teacher = [], None
    if learner.reads_teacher:
        groups.append(teacher_group(job, models, calibration))
        (teacher,) = groups[0].units
    names = [*decomposed, CURVES]
    units = {name: _unit(job, name, calibration, teacher, decomposed) for name in names}
    compute = _Learn(job, models, calibration, teacher, decomposed)
    of_all = list(units.values())
    groups.append(Group("learn", job.method.name, of_all, compute, clear_checkpoints))
    return groups, {name: units[name] for name in decomposed}


def _unit(
    job: Job,
    name: str,
    calibration: Unit,
    teacher: Unit | None,
    decomposed: Mapping[str, Unit],
) -> Unit:
    learner, model = job.method.learn, job.model
    assert learner is not None
    inputs = {"calibration tokens": calibration}
    inputs |= {f"decomposition of {layer}": unit for layer, unit in decomposed.items()}
    if teacher is not None:
        inputs["teacher"] = teacher
    layers = sum(layer.dense_cost for layer in model.layout.layers)
    entries = job.method.stores_entries
    tokens = learner.batch * job.length
    passed = descent(model, learner.steps * tokens, tokens, job.length).part(len(decomposed) + 1)
    return Unit(
        "learn",
        name,
        settings={
            **describe(learner),
            "kept": job.kept,
            "seed": job.learn_seed,
            "dtype": model.compute_dtype,
            "of": name,
        },
        code=[*LOADING, learner],
        sources={"model": model.digest},
        inputs=inputs,
        cost=replace(
            passed,
            # A model with factors of full rank has about twice the weights.
            products=add(passed.products, passed.products),
            held=4 * model.parameters,
            memory=passed.memory
            + (ITEM_BYTES * layers + min(HELD_BYTES, 8 * layers) if entries else 0),
            disk=1000,
        ),
    )


class _Learn:
    def __init__(
        self,
        job: Job,
        models: Models,
        calibration: Unit,
        teacher: Unit | None,
        decomposed: Mapping[str, Unit],
    ) -> None:
        self.job = job
        self.models = models
        self.calibration = calibration
        self.teacher = teacher
        self.decomposed = decomposed

    def __call__(self, work: Work) -> None:
        """Trains once for all missing units.

        Raises:
            ConfigError: Some units are there and this training came to another end, as on another
                device.
        """
        job, learner = self.job, self.job.method.learn
        assert learner is not None
        self.models.drop()
        model = job.model.load()

        def atoms(layer: LayerRef) -> Atoms:
            return read_atoms(Stored(work.artifact(self.decomposed[layer.name])))

        training = training_of(job, work, self.calibration, learner.batch)
        teacher = None if self.teacher is None else read_teacher(work, self.teacher)
        learned = learner.learn(
            Assignment(model, job.model.layout, atoms, job.kept, teacher, training)
        )
        self._require_same(work, learned)
        for unit in work.missing:
            self._keep(work, unit, learned)

    def _solved(self, work: Work) -> dict[str, float]:
        """How far an iterative decomposition came in the layer where it came least far."""
        records = [Stored(work.artifact(unit)) for unit in self.decomposed.values()]
        solved = [record.tensor(SOLVED) for record in records if SOLVED in record.names]
        if not solved:
            return {}
        iterations, residual = torch.stack(solved).amax(dim=0).tolist()
        return {
            "robust PCA, iterations at most": iterations,
            "robust PCA, residual at most": residual,
        }

    def _require_same(self, work: Work, learned: Learned) -> None:
        """What is left of an earlier training has to go with this one: they share the budget."""
        missing = {unit.name for unit in work.missing}
        for unit in work.group.units:
            if unit.name in missing or unit.name not in learned.chosen:
                continue
            if not learned.chosen[unit.name].same(Chosen.unpack(Stored(work.artifact(unit)))):
                raise ConfigError(
                    f"what an earlier training chose for layer {unit.name} is not what this one "
                    "did: train all again with --refresh learn"
                )

    def _keep(self, work: Work, unit: Unit, learned: Learned) -> None:
        with work.draft(unit) as draft:
            if unit.name == CURVES:
                draft.attrs["report"] = {**self._solved(work), **learned.report}
                for name, curve in learned.curves.items():
                    put_tensor(draft, name, curve)
            elif unit.name in learned.chosen:
                put(draft, learned.chosen[unit.name].pack())
            else:
                raise ConfigError(f"{self.job.method.name} chose nothing for layer {unit.name}")
