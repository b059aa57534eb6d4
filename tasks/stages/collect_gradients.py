"""Stage ``collect``, for methods that weigh by gradients: one backward pass of the dense model."""

from dataclasses import replace

from compress_core.hf.fisher import fisher_columns
from tasks.engine.descent import descent
from tasks.engine.job import Job
from tasks.engine.units import Unit
from tasks.engine.whole_models import LOADING, Models
from tasks.engine.work import Group, Work
from tasks.stages.arrays import get_tensor, put_tensor


def fisher_group(job: Job, models: Models, calibration: Unit) -> Group:
    """One unit per layer: the Fisher information of its columns.

    Args:
        job: What is done to which model.
        models: Loads the dense model whole.
        calibration: The unit whose artifact holds the token windows.
    """
    model = job.model
    layers = model.layout.layers
    passed = descent(model, job.samples * job.length, job.length, job.length).part(len(layers))
    units = [
        Unit(
            "collect",
            f"gradients of {layer.name}",  # a tap may have the layer's own name
            settings={"dtype": model.compute_dtype, "gradients of": layer.name},
            code=LOADING,
            sources={"model": model.digest},
            inputs={"calibration tokens": calibration},
            cost=replace(passed, held=2 * model.parameters, disk=8 * layer.in_features),
        )
        for layer in layers
    ]
    return Group("collect", "gradients", units, _Gradients(job, models, calibration))


class _Gradients:
    def __init__(self, job: Job, models: Models, calibration: Unit) -> None:
        self.job = job
        self.models = models
        self.calibration = calibration

    def __call__(self, work: Work) -> None:
        model = self.job.model
        found = fisher_columns(
            self.models.get(work, None),
            model.layout,
            get_tensor(work.artifact(self.calibration), "tokens"),
            device=model.device,
            progress=work.progress,
        )
        for unit in work.missing:
            with work.draft(unit) as draft:
                put_tensor(draft, "fisher", found[unit.settings["gradients of"]])
