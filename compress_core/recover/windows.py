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
    held back is not trained on, as it would tell nothing new about it. Where that would cost more
    than half of the others, which only a short text does, fewer are held back.

    Args:
        windows: Token ids (samples, length).
        share: To hold back.
        seed: Of the choice.

    Raises:
        ConfigError: Too few are left.
    """
    samples, held = len(windows), held_back(len(windows), share)
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    runs = [_runs(window) for window in windows]
    while True:
        apart = _apart(runs, order[:held].tolist())
        if 2 * len(apart) >= samples - held or held == LEAST:
            break
        held = max(LEAST, held // 2)
    if len(apart) < LEAST:
        raise ConfigError(
            f"{samples - held - len(apart)} of {samples} calibration windows overlap the {held} "
            "that recovery holds back, and too few are left: give longer text, or fewer windows"
        )
    return torch.tensor(apart), order[:held].sort().values


def _apart(runs: list[Tensor], held: list[int]) -> list[int]:
    """The windows that have no run of tokens in common with those held back."""
    seen = torch.cat([runs[i] for i in held])
    rest = (i for i in range(len(runs)) if i not in held)
    return [i for i in rest if not bool(torch.isin(runs[i], seen).any())]


def _runs(window: Tensor) -> Tensor:
    """A number for each run of tokens in a window, the same for the same run."""
    length = min(OVERLAP, len(window))
    factors = [1]
    for _ in range(length - 1):
        factors.append(factors[-1] * 1_000_003 % (1 << 61))
    return (window.long().unfold(0, length, 1) * torch.tensor(factors)).sum(-1)
