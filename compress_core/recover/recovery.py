"""Recovery: what a compressed model stores is trained on, end to end, towards the dense model.

A share of the calibration windows is held back and never trained on. The best state on them is what
comes out, and where nothing was better than the start, the start comes out bit for bit.

How far a step may go is found on the model itself. Every step is relative, η times the root mean
square of the tensor that it changes, so factors of any scale move alike. A few steps from the start
are tried with one η of a ladder after the other, uphill in held-back loss, and the best is taken.
In the training proper η warms up and falls with a cosine. When the held-back loss has not fallen
for long, or is far above the start's, the best state comes back and η is halved.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress_core.errors import ConfigError
from compress_core.learn.loop import Training, run_steps, saving_memory
from compress_core.learn.teacher import Teacher
from compress_core.recover.parts import first_in_codes
from compress_core.recover.run import RecoveryRun
from compress_core.recover.settings import Recovery
from compress_core.types import ModelLayout


@dataclass(frozen=True)
class Recovered:
    """What a recovery found.

    Attributes:
        tensors: Name (layer and part, as in the model's files) to tensor, in its stored dtype.
        curves: "kl" and "text" of the step's batch, "held_back" and "tried" (the held-back loss in
            the training, and after a trial), "step_size" (η); float64 (steps,), not-a-number where
            absent.
        report: The held-back loss at the "start" and at its "best", and how many windows were
            "trained" on and "held_back"; empty where no layer is compressed.
    """

    tensors: Mapping[str, Tensor]
    curves: Mapping[str, Tensor]
    report: Mapping[str, float]


def recover(
    model: Any,
    layout: ModelLayout,
    recovery: Recovery,
    teacher: Teacher,
    training: Training,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> Recovered:
    """Trains the stored tensors of a model's compressed layers; everything else stays.

    Args:
        model: The whole compressed model in evaluation mode on ``training.device``; changed.
        layout: The dense model's layout.
        recovery: How.
        teacher: The dense model's predictions on the same windows.
        training: Windows, and where checkpoints go; the seed is the recovery's.
        dtypes: Name of a stored tensor to the dtype of its file; of others it is the parameter's.

    Raises:
        ConfigError: Too few windows, or updates of low rank of a model that holds codes.
        NumericsError: A loss that is not finite; names the step and the layer.
    """
    recovery.check(len(training.windows))
    if recovery.how == "lora" and (name := first_in_codes(model)) is not None:
        raise ConfigError(
            f"layer {name} holds numbers in codes, which updates by lora would change when "
            "they are merged: recover by factors, which trains scales and leaves codes alone"
        )
    run = RecoveryRun(model, layout, recovery, teacher, training, dtypes)
    if not run.parts:  # nothing is compressed
        return Recovered({}, {}, {})
    with saving_memory(model, layout, run.objective.batch * training.windows.shape[1]):
        curves = run_steps(recovery.all_steps, run.step, run.state, training)
    return Recovered(run.result(), curves, run.report())
