"""Stage ``teacher``: the dense model's likeliest tokens, and what else a training is given."""

from compress_core.learn.loop import Training
from compress_core.learn.teacher import Teacher, teach
from storage.keys import recipe_key
from tasks.engine.cost import MODEL, Cost, forward_operations, logits
from tasks.engine.job import Job
from tasks.engine.units import Unit
from tasks.engine.whole_models import LOADING, Models
from tasks.engine.work import Group, Work
from tasks.stages.arrays import get_tensor, put_tensor
from tasks.stages.checkpoints import StoredCheckpoints

TOP = 256  # tokens of the dense model's distribution that are kept at each position


def teacher_group(job: Job, models: Models, calibration: Unit) -> Group:
    """The dense model's top tokens on the calibration windows; every training reads them."""
    model = job.model
    count = job.samples * job.length
    unit = Unit(
        "teacher",
        "top tokens",
        settings={"top": TOP, "dtype": model.compute_dtype},
        code=LOADING,
        sources={"model": model.digest},
        inputs={"calibration tokens": calibration},
        cost=Cost(
            products={MODEL: forward_operations(model, count, job.length)},
            logits=logits(model, count),
            held=model.parameters,
            whole=True,
            disk=8 * TOP * count,
        ),
    )
    return Group("teacher", "calibration", [unit], _Teach(job, models, calibration))


class _Teach:
    def __init__(self, job: Job, models: Models, calibration: Unit) -> None:
        self.job = job
        self.models = models
        self.calibration = calibration

    def __call__(self, work: Work) -> None:
        found = teach(
            self.models.get(work, None),
            get_tensor(work.artifact(self.calibration), "tokens"),
            TOP,
            batch_size=self.job.batch_size,
            device=self.job.model.device,
            progress=work.progress,
        )
        with work.draft(work.missing[0]) as draft:
            put_tensor(draft, "tokens", found.tokens)
            put_tensor(draft, "log_p", found.log_p)


def read_teacher(work: Work, unit: Unit) -> Teacher:
    """The teacher that was kept."""
    artifact = work.artifact(unit)
    return Teacher(get_tensor(artifact, "tokens"), get_tensor(artifact, "log_p"))


def training_of(job: Job, work: Work, calibration: Unit, batch_size: int) -> Training:
    """What the core's loop is given; its states are found by the last unit of the group."""
    recipe = work.session.recipe(work.group.units[-1])
    return Training(
        windows=get_tensor(work.artifact(calibration), "tokens"),
        device=job.model.device,
        batch_size=batch_size,
        seed=job.learn_seed,
        checkpoints=StoredCheckpoints(work.session.store, recipe_key(recipe)),
        progress=work.progress,
    )
