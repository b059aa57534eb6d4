"""One of a machine's devices for a process alone, where several compute at once."""

import time
from collections.abc import Callable
from contextlib import suppress

import torch

from storage.errors import LeaseHeldError
from storage.keys import recipe_key
from storage.layout import Layout
from storage.leases import Claim, claim_files

PAUSE_SECONDS = 2.0
_CLAIMS: list[Claim] = []  # held as long as the process lives


def own_device(
    device: str,
    layout: Layout,
    count: int | None = None,
    pause: Callable[[], None] = lambda: time.sleep(PAUSE_SECONDS),
) -> str:
    """A device that no other process has for itself, from now until this one ends.

    Where processes of another command have them all it waits, as for units.

    Args:
        device: What the command asked for; one that has a number, or is not CUDA, is shared.
        layout: Of the store of this machine, whose leases say what is taken.
        count: How many there are; None asks CUDA.
        pause: What is done between two looks while all are taken.
    """
    if device != "cuda":
        return device
    numbers = range(torch.cuda.device_count() if count is None else count)
    assert numbers, "CUDA has no device here"
    while True:
        for number in numbers:
            with suppress(LeaseHeldError):
                _CLAIMS.append(claim_files(layout, "device", [recipe_key({"cuda": number})]))
                return f"cuda:{number}"
        pause()
