"""What settings alone show to be impossible: methods, budgets, missing text, a device."""

from collections.abc import Mapping

import torch

from compress_core.errors import ConfigError
from compress_core.method import Method
from compress_core.methods import build_method
from compress_core.types import Budget
from flows.settings.config import RunConfig, Settings


def choose_device(wanted: str) -> str:
    """A device that exists.

    Raises:
        ConfigError: The device asked for is not there.
    """
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(wanted).type
        torch.empty(0, dtype=torch.float64, device=wanted)  # decompositions need float64
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        line = str(error).splitlines()[0]
        raise ConfigError(f"--device {wanted} cannot be used: {line}") from None
    if kind == "meta":
        raise ConfigError("--device meta computes nothing; use cpu or cuda")
    return wanted


def check_methods(settings: Settings, methods: list[str], kepts: list[float]) -> dict[str, Method]:
    """Builds every method once, so that mistakes show at once.

    Returns:
        The methods, by what the user called them.

    Raises:
        ConfigError: Unknown method or option, a budget out of range, missing calibration text.
    """
    for kept in kepts:
        Budget(kept, settings.of)
    built = {name: build_method(name, settings.options, settings.allocate) for name in methods}
    for name, method in built.items():
        if method.needs_calibration and settings.calibration is None:
            raise ConfigError(f"method {name!r} needs calibration text: give --calibration FILE")
        if method.eight_bits and settings.recovery is not None:
            raise ConfigError(
                f"--recover trains numbers and {name!r} stores its factors in 8 bits, whose codes "
                "are fixed: leave one of the two out"
            )
    _check_recovery(settings)
    _check_idle(settings, built)
    if settings.calibration is None and not settings.eval_text and not settings.tasks:
        raise ConfigError(
            "nothing to evaluate on: give --eval-text FILE, --tasks NAME or --calibration FILE "
            "(of which a tenth is then held back)"
        )
    searched = isinstance(settings, RunConfig) and settings.target_perplexity is not None
    if searched and settings.calibration is None and not settings.eval_text:
        raise ConfigError("--target-perplexity needs text to measure it on: give --eval-text FILE")
    return built


def _check_idle(settings: Settings, methods: Mapping[str, Method]) -> None:
    """Refuses options that nothing would read.

    Raises:
        ConfigError: One is there.
    """
    if settings.task_path is not None and not settings.tasks:
        raise ConfigError("--task-path without --tasks: say which tasks of that folder to run")
    if settings.task_limit is not None and not settings.tasks:
        raise ConfigError("--task-limit without --tasks: say which tasks to run")
    if settings.num_fewshot is not None and not settings.tasks:
        raise ConfigError("--num-fewshot without --tasks: say which tasks to run")
    if settings.apply_chat_template and not settings.tasks:
        raise ConfigError("--apply-chat-template without --tasks: say which tasks to run")
    if settings.eval_field is not None and not settings.eval_text:
        raise ConfigError("--eval-field without --eval-text: say of which text")
    if settings.skip_bad_rows and settings.calibration is None and not settings.eval_text:
        raise ConfigError("--skip-bad-rows without a text: give --calibration or --eval-text")
    if settings.calibration_field is not None and settings.calibration is None:
        raise ConfigError("--calibration-field without --calibration: say of which text")
    if settings.learn_seed is not None and not any(method.learn for method in methods.values()):
        raise ConfigError(
            f"--learn-seed is of methods that train on the whole model; {next(iter(methods))!r} "
            "does not"
        )


def _check_recovery(settings: Settings) -> None:
    """Refuses a recovery without text, with too little of it, and its settings without it."""
    if settings.recovery is None:
        given = [
            "--" + name.replace("_", "-")
            for name, field in Settings.model_fields.items()
            if name.startswith("recover_") and getattr(settings, name) != field.default
        ]
        if given:
            raise ConfigError(f"{given[0]} without --recover: say how, lora or factors")
        return
    if settings.calibration is None:
        raise ConfigError(
            f"--recover {settings.recover} trains on calibration text: give --calibration FILE"
        )
    settings.recovery.check(settings.samples)
