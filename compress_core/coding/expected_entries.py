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

import torch
from torch import Tensor

from compress_core.coding.expected import DAMPING, ranges, unsaid
from compress_core.prune.fitted import BLOCK
from compress_core.prune.obs import damped, inverse_factor, remove
from compress_core.sparse import Sparse

LEVELS = 32  # a layer may keep 1, 2, ... LEVELS - 1 of so many parts of its entries
SWEPT = (4, 8, 16)  # levels at which the sweep is done
TINY = 1e-30  # of all there is to lose: what is lost by removing nothing has a logarithm


def level_counts(size: int) -> list[int]:
    """Entries of a layer of ``size`` numbers at every level; small layers have fewer levels."""
    counts = [size * level // LEVELS for level in range(LEVELS)]
    return sorted({count for count in counts if count})


def costs_of_entries(weight: Tensor, moment: Tensor, fisher: Tensor, group: int) -> Tensor:
    """What is lost at every level: by removing the others, and κ of rounding those that stay.

    Args:
        weight: W (out, in), float64.
        moment: H = E[x xᵀ] (in, in).
        fisher: G (out, out).
        group: Codes that share a scale: of entries that follow one another, row by row.

    Returns:
        float64 (levels, 2), in nats per token; the second is divided by (2^b - 1)² for b bits.
    """
    alive, size = moment.diagonal() > 0, weight.numel()
    factor = inverse_factor(damped(moment, DAMPING), DAMPING)
    weights = fisher.diagonal()[:, None] * unsaid(moment, factor) / 2
    rows = fisher.diagonal().sqrt()[:, None]
    at, cuts, kappas = [0], [_lost(weight, moment, fisher)], [0.0]
    for count in sorted({size * level // LEVELS for level in SWEPT} - {0}):
        found = remove(rows * weight * alive, factor, count, None, BLOCK)
        at.append(count)
        cuts.append(_lost(weight - found.dense() / rows, moment, fisher))
        kappas.append(_rounding(Sparse.of(weight, found.mask), weights, group))
    everything = Sparse.of(weight, torch.ones_like(weight, dtype=torch.bool))
    whole = _rounding(everything, weights, group)
    scores = (weights * weight.square()).flatten().sort().values
    removed = torch.cat([scores.new_zeros(1), scores.cumsum(0)]).flip(0)  # by what stays
    scale = cuts[-1] / max(float(removed[at[-1]]), TINY)
    found_at = [
        (_between(n, at, cuts), _line(n, at, kappas))
        if n <= at[-1]
        else (scale * float(removed[n]), _line(n, [at[-1], size], [kappas[-1], whole]))
        for n in level_counts(size)
    ]
    return torch.tensor(found_at, dtype=torch.float64).reshape(-1, 2)


def _lost(error: Tensor, moment: Tensor, fisher: Tensor) -> float:
    """½ tr(G E H Eᵀ)."""
    return float(((fisher @ error @ moment) * error).sum().clamp_min(0)) / 2


def _rounding(entries: Sparse, weights: Tensor, group: int) -> float:
    """κ of some entries of the weight."""
    spans = ranges(entries.values[None], group)[0]
    return float((spans.square() * weights[entries.mask]).sum()) / 12


def _line(count: int, at: list[int], known: list[float]) -> float:
    right = next(place for place in range(1, len(at)) if at[place] >= count)
    low, high = at[right - 1], at[right]
    return known[right - 1] + (known[right] - known[right - 1]) * (count - low) / (high - low)


def _between(count: int, at: list[int], known: list[float]) -> float:
    floor = TINY * known[0] + torch.finfo(torch.float64).tiny
    return math.exp(_line(count, at, [math.log(max(value, floor)) for value in known]))
