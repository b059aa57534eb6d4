"""What settings alone show to be impossible: methods, budgets, missing text, a device."""

import importlib.util
from collections.abc import Mapping
from itertools import combinations

import torch

from compress_core.errors import ConfigError
from compress_core.forms.names import EIGHT_BITS
from compress_core.method import Method
from compress_core.methods import build_method
from compress_core.types import Budget
from flows.settings.config import RunConfig, Settings
from flows.settings.fields import EXTRAS, HERE
from flows.settings.idle import check_idle
from flows.settings.threads import affinity

TOKEN_BYTES = 16  # of a token of a window while windows are made: in a list and in a tensor


def choose_device(wanted: str) -> str:
    """A device that exists.

    Raises:
        ConfigError: The device asked for is not there.
    """
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind, index = torch.device(wanted).type, torch.device(wanted).index
        torch.empty(0, dtype=torch.float64, device=wanted)  # decompositions need float64
    except Exception as error:  # torch has no one kind for a backend that is not there
        line = str(error).splitlines()[0].partition(". ")[0]
        raise ConfigError(f"--device {wanted} cannot be used: {line}") from None
    if kind == "meta":
        raise ConfigError("--device meta computes nothing; use cpu or cuda")
    if kind == "cpu" and index:
        raise ConfigError(f"--device {wanted}: the processor is one device; use cpu")
    return wanted


def check_runner(settings: Settings) -> None:
    """Refuses a runner whose library is not there, and more processes than GPUs.

    Raises:
        ConfigError: Either.
    """
    needed = EXTRAS.get(settings.runner)
    if needed is not None and importlib.util.find_spec(needed) is None:
        raise ConfigError(
            f"--runner {settings.runner} needs {needed.replace('_', '-')}: "
            f"pip install 'eigenpress[{settings.runner}]'"
        )
    device = choose_device(settings.device)
    here = settings.runner != HERE and settings.cluster is None
    if here and device != "cpu" and workers_of(settings) > _most_workers(device):
        raise ConfigError(
            f"--workers {settings.workers}: a process has a GPU to itself, and --device "
            f"{settings.device} has {_most_workers(device)} here"
        )


def workers_of(settings: Settings) -> int:
    """How many processes compute: as many as were asked for, else as a device keeps busy."""
    if settings.runner == HERE:
        return 1
    return settings.workers or _most_workers(choose_device(settings.device))


def sharing_memory(settings: Settings) -> int:
    """How many of them divide the memory that a command may take: on a CPU of this machine all."""
    alone = settings.cluster is not None or choose_device(settings.device) != "cpu"
    return 1 if alone else workers_of(settings)


def _most_workers(device: str) -> int:
    """One per GPU, or per core of a CPU."""
    if device.partition(":")[0] == "cuda":
        return 1 if ":" in device else torch.cuda.device_count()
    return affinity()


def check_windows(samples: int, length: int, free: int) -> None:
    """Refuses more calibration windows than memory holds.

    Args:
        samples: How many.
        length: Tokens in each.
        free: Bytes of memory that are free.

    Raises:
        ConfigError: They take more than is free.
    """
    needed = samples * length * TOKEN_BYTES
    if needed > free:
        raise ConfigError(
            f"--samples {samples:,} of --length {length:,} take {needed:,} bytes of memory, and "
            f"{free:,} are free: ask for fewer"
        )


def check_methods(settings: Settings, methods: list[str], kepts: list[float]) -> dict[str, Method]:
    """Builds every method once, so that mistakes show at once.

    Returns:
        The methods, by what the user called them.

    Raises:
        ConfigError: Unknown method or option, a budget out of range, missing calibration text.
    """
    for kept in kepts:
        Budget(kept, settings.of)
    built = {
        name: build_method(name, settings.options, settings.allocate, *settings.made_by)
        for name in methods
    }
    for name, method in built.items():
        if method.needs_calibration and settings.calibration is None:
            raise ConfigError(f"method {name!r} needs calibration text: give --calibration FILE")
        if method.form == EIGHT_BITS and settings.recovery is not None:
            raise ConfigError(
                f"--recover trains numbers and {name!r} stores its factors in 8 bits, whose codes "
                "are fixed: leave one of the two out"
            )
        if method.coding is not None and settings.recover == "lora":
            raise ConfigError(
                f"--recover lora makes updates that codes, which {name!r} stores, cannot take in: "
                "give --recover factors, which trains their scales"
            )
    check_idle(settings, built)
    _check_recovery(settings)
    _check_same(built)
    if settings.calibration is None and not settings.eval_text and not settings.tasks:
        raise ConfigError(
            "nothing to evaluate on: give --eval-text FILE, --tasks NAME or --calibration FILE "
            "(of which a tenth is then held back)"
        )
    searched = isinstance(settings, RunConfig) and settings.target_perplexity is not None
    if searched and settings.calibration is None and not settings.eval_text:
        raise ConfigError("--target-perplexity needs text to measure it on: give --eval-text FILE")
    return built


def _check_same(methods: Mapping[str, Method]) -> None:
    """Refuses methods of a sweep that are one and the same.

    Raises:
        ConfigError: Two are.
    """
    for (first, one), (second, other) in combinations(methods.items(), 2):
        if one.essence == other.essence:
            raise ConfigError(f"methods {first!r} and {second!r} are the same: leave one out")


def _check_recovery(settings: Settings) -> None:
    """Refuses a recovery without text, or with too little of it."""
    if settings.recovery is None:
        return
    if settings.calibration is None:
        raise ConfigError(
            f"--recover {settings.recover} trains on calibration text: give --calibration FILE"
        )
    settings.recovery.check(settings.samples)
