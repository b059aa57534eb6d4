"""Stage ``collect``, for methods that weigh by gradients: one backward pass of the dense model."""

from compress_core.hf.fisher import fisher_columns
from tasks.engine.job import Job
from tasks.engine.units import Cost, Group, Unit, Work
from tasks.stages.arrays import get_tensor, put_tensor
from tasks.stages.evaluate import Models

CODE = ("compress_core.hf.fisher.fisher_columns", "compress_core.hf.loading.load_model")


def fisher_group(job: Job, models: Models, calibration: Unit) -> Group:
    """One unit per layer: the Fisher information of its columns.

    Args:
        job: What is done to which model.
        models: Loads the dense model whole.
        calibration: The unit whose artifact holds the token windows.
    """
    model = job.model

    def compute(work: Work) -> None:
        found = fisher_columns(
            models.get(work, None),
            model.layout,
            get_tensor(work.artifact(calibration), "tokens"),
            device=model.device,
            progress=work.progress,
        )
        for unit in work.missing:
            with work.draft(unit) as draft:
                put_tensor(draft, "fisher", found[unit.settings["gradients of"]])

    layers = model.layout.layers
    operations = 6.0 * job.samples * job.length * model.parameters / len(layers)
    units = [
        Unit(
            "collect",
            f"gradients of {layer.name}",  # a tap may have the layer's own name
            settings={"dtype": model.compute_dtype, "gradients of": layer.name},
            code=CODE,
            sources={"model": model.digest},
            inputs={"calibration tokens": calibration},
            cost=Cost(operations, 2 * model.checkpoint.nbytes, 8 * layer.in_features),
        )
        for layer in layers
    ]
    return Group("collect", "gradients", units, compute)
