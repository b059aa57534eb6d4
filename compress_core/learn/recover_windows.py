"""Which calibration windows recovery trains on, and which it only watches."""

import torch
from torch import Tensor

from compress_core.errors import ConfigError

LEAST = 2  # windows on either side
OVERLAP = 32  # tokens in a row that two windows have in common only if they overlap


def held_back(samples: int, share: float) -> int:
    """How many of so many windows are held back.

    Raises:
        ConfigError: Too few are left.
    """
    held = max(LEAST, round(share * samples))
    if samples - held < LEAST:
        raise ConfigError(
            f"recovery holds {held} of {samples} calibration windows back and needs at least "
            f"{LEAST} more to train on: give more calibration windows"
        )
    return held


def split_windows(windows: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Windows to train on and windows held back, as ascending int64 indices.

    Windows are drawn at random places of a text and may overlap; what overlaps a window that is
    held back is not trained on, as it would tell nothing new about it.

    Args:
        windows: Token ids (samples, length).
        share: To hold back.
        seed: Of the choice.

    Raises:
        ConfigError: Too few are left.
    """
    samples = len(windows)
    held = held_back(samples, share)
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    watched = order[:held].sort().values
    seen = torch.cat([_runs(windows[i]) for i in watched.tolist()])
    rest = order[held:].sort().values
    apart = [i for i in rest.tolist() if not bool(torch.isin(_runs(windows[i]), seen).any())]
    if len(apart) < LEAST:
        raise ConfigError(
            f"{samples - held - len(apart)} of {samples} calibration windows overlap the {held} "
            "that recovery holds back, and too few are left: give longer text, or fewer windows"
        )
    return torch.tensor(apart), watched


def _runs(window: Tensor) -> Tensor:
    """A number for each run of tokens in a window, the same for the same run."""
    length = min(OVERLAP, len(window))
    factors = [1]
    for _ in range(length - 1):
        factors.append(factors[-1] * 1_000_003 % (1 << 61))
    return (window.long().unfold(0, length, 1) * torch.tensor(factors)).sum(-1)
