"""Which calibration windows recovery trains on, and which it only watches."""

import torch
from torch import Tensor

from compress_core.errors import ConfigError

LEAST = 2  # windows on either side
OVERLAP = 32  # tokens below which an overlap is let pass


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
    overlaps = _Overlaps(windows)
    while True:
        apart = overlaps.apart(order[:held].tolist())
        if 2 * len(apart) >= samples - held or held == LEAST:
            break
        held = max(LEAST, held // 2)
    if len(apart) < LEAST:
        raise ConfigError(
            f"{samples - held - len(apart)} of {samples} calibration windows overlap the {held} "
            "that recovery holds back, and too few are left: give longer text, or fewer windows"
        )
    return torch.tensor(apart), order[:held].sort().values


class _Overlaps:
    """Which windows are pieces of one text that overlap.

    Texts repeat themselves, so a run of tokens in common is not enough: from where the later window
    begins to where the earlier one ends, both have to be the same.
    """

    def __init__(self, windows: Tensor) -> None:
        marked = bool((windows[:, 0] == windows[0, 0]).all())  # each begins with the same token
        self.windows = windows[:, 1:] if marked and windows.shape[1] > LEAST else windows
        self.runs = [_runs(window) for window in self.windows]

    def apart(self, held: list[int]) -> list[int]:
        """The windows that overlap none of those held back."""
        rest = (i for i in range(len(self.runs)) if i not in held)
        return [i for i in rest if not any(self._overlap(i, other) for other in held)]

    def _overlap(self, one: int, other: int) -> bool:
        return self._follows(one, other) or self._follows(other, one)

    def _follows(self, later: int, earlier: int) -> bool:
        """Whether a window begins within another one, and goes on as it does."""
        first, last = self.windows[later], self.windows[earlier]
        starts = (self.runs[earlier] == self.runs[later][0]).nonzero().flatten().tolist()
        return any(torch.equal(last[start:], first[: len(last) - start]) for start in starts)


def _runs(window: Tensor) -> Tensor:
    """A number for each run of tokens in a window, the same for the same run."""
    length = min(OVERLAP, len(window))
    factors = [1]
    for _ in range(length - 1):
        factors.append(factors[-1] * 1_000_003 % (1 << 61))
    return (window.long().unfold(0, length, 1) * torch.tensor(factors)).sum(-1)
