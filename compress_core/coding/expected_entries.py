"""What keeping only some entries of a weight is expected to cost, before a budget is known.

Optimal brain surgery (SparseGPT, arXiv 2301.00774) goes through the columns: an entry w_ij that is
removed costs w_ij² d_j, d_j = 1 / [H_F⁻¹]_jj with F the columns from j on. With G the Fisher
information of the outputs it weighs G_ii / 2 and is nats of KL (see ``curvature``). The updates of
the sweep make entries to come larger: where inputs are much alike, the sum over those that go is
far below what a layer of few entries loses. So the sweep is done at some levels and its error is
taken, ½ tr(G E H Eᵀ); between them lie straight lines in its logarithm, and above the last the sum,
scaled to that.
"""

import math

import numpy as np
import torch
from torch import Tensor

from compress_core.coding.expected import Inputs, in_groups, spans
from compress_core.curvature import form_by_column
from compress_core.prune.fitted import BLOCK
from compress_core.prune.obs import remove_to_each

LEVELS = 32  # a layer may keep 1, 2, ... LEVELS - 1 of so many parts of its entries
SWEPT = (4, 8, 16)  # levels at which the sweep is done
TINY = 1e-30  # of all there is to lose: what is lost by removing nothing has a logarithm


def level_counts(size: int) -> list[int]:
    """Entries of a layer of ``size`` numbers at every level; small layers have fewer levels."""
    counts = [size * level // LEVELS for level in range(LEVELS)]
    return sorted({count for count in counts if count})


def costs_of_entries(weight: Tensor, inputs: Inputs, fisher: Tensor, group: int) -> Tensor:
    """What is lost at every level: by removing the others, and κ of rounding those that stay.

    Args:
        weight: W (out, in), float64.
        inputs: Their second moment.
        fisher: G (out, out).
        group: Codes that share a scale: of entries that follow one another, row by row.

    Returns:
        float64 (levels, 2), in nats per token; the second is divided by (2^b - 1)² for b bits.
    """
    size, importance = weight.numel(), fisher.diagonal()[:, None] * inputs.unsaid / 2
    counts = sorted({size * level // LEVELS for level in SWEPT} - {0})
    masks, lost = _swept(weight, inputs, fisher, counts)
    whole = form_by_column(fisher, weight @ inputs.moment, weight).sum()
    at, cuts = [0, *counts], [float(whole.clamp_min(0)) / 2, *lost]
    kappas = [0.0, *(_rounding(weight, importance, mask, group) for mask in masks)]
    everything = _rounding(weight, importance, None, group)
    removed = _smallest(importance * weight.square())
    scale = cuts[-1] / max(float(removed[size - at[-1]]), TINY)
    found_at = [
        (_between(n, at, cuts), _line(n, at, kappas))
        if n <= at[-1]
        else (
            scale * float(removed[size - n]),
            _line(n, [at[-1], size], [kappas[-1], everything]),
        )
        for n in level_counts(size)
    ]
    return torch.tensor(found_at, dtype=torch.float64).reshape(-1, 2)


def _swept(
    weight: Tensor, inputs: Inputs, fisher: Tensor, counts: list[int]
) -> tuple[list[Tensor], list[float]]:
    """Which entries a sweep keeps with each of some counts, and ½ tr(G E H Eᵀ) of what it loses.

    H + δ = R Rᵀ, and of E R the sweep knows every number: nothing where an entry stays. So it is
    ½ tr(G (E R) (E R)ᵀ) − ½ δ tr(G E Eᵀ), and nothing has to be multiplied by H.
    """
    least = torch.finfo(torch.float64).tiny ** 0.5  # of an output that no gradient reaches
    rows, triangle = fisher.diagonal().sqrt().clamp_min(least), inputs.triangle
    scaled = rows[:, None] * weight * (inputs.moment.diagonal() > 0)
    found = remove_to_each(scaled, triangle, counts, BLOCK)
    alike = fisher / rows / rows[:, None]
    masks, lost = [], []
    for one in range(len(counts)):
        errors, kept = found.errors[:, one].T, found.kept[:, one].T
        beyond = (errors - found.wanted[:, one].T) * triangle.diagonal()
        both = form_by_column(alike, beyond, beyond) - inputs.added * form_by_column(
            alike, errors, errors
        )
        masks.append(kept)
        lost.append(float(both.sum().clamp_min(0)) / 2)
    return masks, lost


def _rounding(weight: Tensor, importance: Tensor, kept: Tensor | None, group: int) -> float:
    """κ of some entries of a weight, or of all."""
    parts = [weight.flatten(), importance.flatten()]
    if kept is not None:
        places = kept.flatten().nonzero().flatten()
        parts = [part[places] for part in parts]
    values, weights = (part[None] for part in parts)
    weighed = spans(values, group).square() * in_groups(weights, group).sum(dim=2)
    return float(weighed.sum()) / 12


def _smallest(scores: Tensor) -> Tensor:
    """The sum of so many of the smallest, from none to all."""
    if scores.device.type == "cpu":  # by vector instructions, which PyTorch's has not
        ordered = torch.from_numpy(np.sort(scores.numpy(), axis=None))
    else:
        ordered = scores.flatten().sort().values
    return torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])


def _line(count: int, at: list[int], known: list[float]) -> float:
    right = next(place for place in range(1, len(at)) if at[place] >= count)
    low, high = at[right - 1], at[right]
    return known[right - 1] + (known[right] - known[right - 1]) * (count - low) / (high - low)


def _between(count: int, at: list[int], known: list[float]) -> float:
    floor = TINY * known[0] + torch.finfo(torch.float64).tiny
    return math.exp(_line(count, at, [math.log(max(value, floor)) for value in known]))
