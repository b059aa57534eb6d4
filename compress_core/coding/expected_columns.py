"""What keeping only some columns of a weight, fitted anew, is expected to cost.

Columns are taken out one after another (see ``prune.columns``), each where it costs the least nats,
½ tr(G E H Eᵀ) with G the Fisher information of the outputs (see ``curvature``). What is left at a
level is what a layer of so many columns would be, so that its error is no estimate: it is that sum,
which counts what is added to H, less the part of that. Beside it stands κ of rounding the columns,
as ``expected`` says it of a matrix, in the second moment of their own inputs.
"""

import numpy as np
import torch
from torch import Tensor

from compress_core.coding.expected import Inputs, row_costs
from compress_core.coding.expected_entries import LEVELS, level_counts
from compress_core.prune.columns import Reduced, eliminate, inverse_of

ROUNDED = (4, 8, 16, 24)  # levels at which κ is taken; between them lie straight lines


def costs_of_columns(weight: Tensor, inputs: Inputs, fisher: Tensor, group: int) -> Tensor:
    """What is lost by keeping as many columns as each level of ``level_counts(in)``, and κ of them.

    Args:
        weight: W (out, in), float64.
        inputs: Their second moment.
        fisher: G (out, out).
        group: Codes that share a scale: of neighbours in a column.

    Returns:
        float64 (levels, 2), in nats per token; the second is divided by (2^b - 1)² for b bits.
    """
    size, counts = weight.shape[1], level_counts(weight.shape[1])
    looked_at = {size * level // LEVELS for level in ROUNDED}
    moment, added = inputs.moment, inputs.added
    read = weight * (moment.diagonal() > 0)
    weighed = fisher @ read
    inverse = inverse_of(inputs.triangle)
    everything = Reduced(torch.arange(size, device=weight.device), read, weighed, inverse, 0.0)
    at, kappas = [size], [_rounding(everything, moment, fisher, group)]
    own, cuts = (read * weighed).sum(dim=0) * added, list[float]()
    for found in eliminate(read, weighed, inverse, counts[::-1]):
        index = found.index
        changed = (read[:, index] - found.weight) * (weighed[:, index] - found.weighed)
        by_damping = own.index_copy(0, index, changed.sum(dim=0) * added[index]).sum()
        cuts.append(max(0.0, found.lost - float(by_damping)) / 2)
        if len(index) in looked_at:
            at.append(len(index))
            kappas.append(_rounding(found, moment, fisher, group))
    lines = np.interp(counts, [0, *at[::-1]], [0.0, *kappas[::-1]])
    return torch.stack([torch.tensor(cuts[::-1], dtype=torch.float64), torch.from_numpy(lines)], 1)


def _rounding(found: Reduced, moment: Tensor, fisher: Tensor, group: int) -> float:
    """κ of columns in the second moment of their inputs, which a factor of its inverse says."""
    factor = torch.linalg.cholesky(found.inverse)
    alive = moment.diagonal()[found.index] > 0
    left = torch.where(alive, factor.diagonal().square().reciprocal(), 0.0)
    return float(row_costs(found.weight.T.contiguous(), fisher.diagonal(), group) @ left) / 2
