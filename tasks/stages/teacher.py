"""What a training stage needs around the core's loop: the teacher, checkpoints, the windows."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from compress_core.learn.loop import Training
from compress_core.learn.teacher import Teacher, teach
from storage.keys import recipe_key
from storage.store import Store
from tasks.engine.job import Job
from tasks.engine.scratch import SCRATCH, discard, keep, load, names_of
from tasks.engine.units import Cost, Group, Session, Unit, Work
from tasks.stages.arrays import get_tensor, put_tensor
from tasks.stages.evaluate import Models

PLACES = (0, 1)  # of checkpoints
TOP = 256  # tokens of the dense model's distribution that are kept at each position


def teacher_group(job: Job, models: Models, calibration: Unit) -> Group:
    """The dense model's top tokens on the calibration windows; every training reads them."""
    model = job.model

    def compute(work: Work) -> None:
        found = teach(
            models.get(work, None),
            get_tensor(work.artifact(calibration), "tokens"),
            TOP,
            batch_size=job.batch_size,
            device=model.device,
            progress=work.progress,
        )
        with work.draft(work.missing[0]) as draft:
            put_tensor(draft, "tokens", found.tokens)
            put_tensor(draft, "log_p", found.log_p)

    count = job.samples * job.length
    unit = Unit(
        "teacher",
        "top tokens",
        settings={"top": TOP, "dtype": model.compute_dtype},
        code=["compress_core.learn.teacher.teach", "compress_core.hf.loading.load_model"],
        sources={"model": model.digest},
        inputs={"calibration tokens": calibration},
        cost=Cost(2.0 * model.parameters * count, model.checkpoint.nbytes, 8 * TOP * count),
    )
    return Group("teacher", "calibration", [unit], compute)


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


def clear_checkpoints(session: Session, recipe: Mapping[str, Any]) -> None:
    """What a training's group does when all its units are there.

    A process may have been killed between the end of a training and the removal of its states.
    """
    StoredCheckpoints(session.store, recipe_key(recipe)).clear()


class StoredCheckpoints:
    """States of a training in the store: only the latest is kept, and none when it is done.

    A state goes where the one before the last was, so that one is whole whenever the process dies.

    Args:
        store: Where artifacts are kept.
        key: Of a unit that the training makes; its states are found by it.
    """

    def __init__(self, store: Store, key: str) -> None:
        self.store = store
        self.key = key
        self._last = 1

    def load(self) -> dict[str, Tensor] | None:
        """The latest state, or None at the beginning."""
        for place in sorted(PLACES, key=self._step, reverse=True):
            found = self._read(place)
            if found is not None:
                self._last = place
                return found
        return None

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Keeps the state after ``step`` steps, and then removes the one before."""
        place = 1 - self._last
        self._discard(place)
        keep(self.store, self._recipe(place), f"training at step {step}", tensors)
        self._discard(self._last)
        self._last = place

    def clear(self) -> None:
        """Removes what is left when the training is done."""
        for place in PLACES:
            self._discard(place)

    def _read(self, place: int) -> dict[str, Tensor] | None:
        names = names_of(self.store, self._recipe(place))
        found = None if names is None else load(self.store, self._recipe(place), *names)
        return None if names is None or found is None else dict(zip(names, found, strict=True))

    def _step(self, place: int) -> int:
        found = load(self.store, self._recipe(place), "step")
        return 0 if found is None else int(found[0])

    def _discard(self, place: int) -> None:
        discard(self.store, self._recipe(place))

    def _recipe(self, place: int) -> dict[str, Any]:
        settings = {"training of": self.key, "place": place}
        return {"stage": SCRATCH, "settings": settings, "sources": {}, "inputs": {}, "code": {}}
