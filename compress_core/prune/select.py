"""Which entries of a layer stay: the best of each row, of the whole, or N of every M in a row.

Ties are broken by place, so that the same scores always give the same entries.
"""

import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compress_core.errors import ConfigError, NumericsError

UNSTRUCTURED = "unstructured"


@dataclass(frozen=True)
class Pattern:
    """N entries stay of every M neighbours in a row, as in 2:4.

    Attributes:
        keep: N.
        of: M.
    """

    keep: int
    of: int


def read_pattern(text: str) -> Pattern | None:
    """The pattern that ``text`` names; None for "unstructured".

    Raises:
        ConfigError: It is neither "unstructured" nor N:M with 1 <= N < M.
    """
    if text == UNSTRUCTURED:
        return None
    found = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", text)
    if found is None or int(found[1]) >= int(found[2]):
        raise ConfigError(
            f"pattern is {UNSTRUCTURED!r} or N:M with N of every M entries kept, such as 2:4; "
            f"got {text!r} (YAML reads 2:4 as a number unless it is in quotes)"
        )
    return Pattern(int(found[1]), int(found[2]))


def best_of_all(scores: Tensor, count: int) -> Tensor:
    """The mask (out, in) of the ``count`` highest of all scores (out, in).

    Raises:
        NumericsError: A score is no number.
    """
    if not 0 < count < scores.numel():
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    least = _nth_largest(scores, count)
    mask = scores >= least
    if int(mask.sum()) != count:
        if bool(scores.isnan().any()):  # counted as the highest, and no score is above it
            raise NumericsError(f"what is to be pruned {tuple(scores.shape)} is not finite")
        mask = scores > least
        ties = (scores == least).nonzero()[: count - int(mask.sum())]
        mask[ties[:, 0], ties[:, 1]] = True
    return mask


def _nth_largest(scores: Tensor, n: int) -> float:
    """On the CPU NumPy selects with vector instructions, in a tenth of PyTorch's time."""
    if scores.device.type != "cpu":
        return float(scores.flatten().kthvalue(scores.numel() - n + 1).values)
    numbers = scores.numpy().ravel(order="K")
    return float(np.partition(numbers, len(numbers) - n)[len(numbers) - n])


def best_of_rows(scores: Tensor, count: int) -> Tensor:
    """The mask (out, in) of the highest scores of each row, ``count`` in all.

    What does not divide by the rows goes to those whose next entry scores highest, so that rows
    differ by at most one entry.
    """
    each, extra = divmod(count, scores.shape[0])
    order = scores.argsort(dim=1, descending=True, stable=True)
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order[:, :each], True)
    if extra:
        following = order[:, each]
        gain = scores.gather(1, following[:, None]).flatten()
        rows = gain.argsort(descending=True, stable=True)[:extra]
        mask[rows, following[rows]] = True
    return mask


def best_of_groups(scores: Tensor, pattern: Pattern) -> Tensor:
    """The mask (out, in) of the N highest scores of every M; M divides ``in``."""
    groups = scores.reshape(scores.shape[0], -1, pattern.of)
    order = groups.argsort(dim=2, descending=True, stable=True)[:, :, : pattern.keep]
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, order, True)
    return mask.view_as(scores)


def select_rows(scores: Tensor, count: int, pattern: Pattern | None) -> Tensor:
    """The mask (out, in) by ``pattern``, or the best ``count`` of rows where there is none."""
    return best_of_rows(scores, count) if pattern is None else best_of_groups(scores, pattern)
