"""One of a machine's devices for a process alone, where several compute at once."""

import torch

from storage.errors import LeaseHeldError
from storage.keys import recipe_key
from storage.layout import Layout
from storage.leases import Claim, claim_files

_CLAIMS: list[Claim] = []  # held as long as the process lives


def own_device(device: str, layout: Layout, count: int | None = None) -> str:
    """A device that no other process has for itself, from now until this one ends.

    Args:
        device: What the command asked for; one that has a number, or is not CUDA, is shared.
        layout: Of the store of this machine, whose leases say what is taken.
        count: How many there are; None asks CUDA.

    Raises:
        LeaseHeldError: All are taken.
    """
    if device != "cuda":
        return device
    last: LeaseHeldError | None = None
    for number in range(torch.cuda.device_count() if count is None else count):
        try:
            _CLAIMS.append(claim_files(layout, "device", [recipe_key({"cuda": number})]))
        except LeaseHeldError as error:
            last = error
        else:
            return f"cuda:{number}"
    raise last or RuntimeError("CUDA has no device here")
