"""W ≈ Q + L: a weight in codes, and a product of low rank for what rounding took away.

As in EoRA (arXiv 2410.21271) L is the best of its rank in the metric H of the outputs, where LQER
(arXiv 2402.02446) scales inputs; as in CALDERA (arXiv 2405.18886) both are found by turns.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from compress_core.coding.gptq import Swept
from compress_core.coding.rounded import rounded
from compress_core.coding.settings import Coding
from compress_core.decompose import LowRank, project
from compress_core.errors import ConfigError
from compress_core.metric import SecondMoment


def correct(
    weight: Tensor,
    moment: Tensor,
    rank: int,
    coding: Coding,
    dtype: torch.dtype,
    turns: int = 5,
    told: Callable[[float], None] = lambda error: None,
) -> LowRank:
    """What ``code_layer`` makes the best Q + L of all turns of.

    In turn Q is W − L by GPTQ, and L the best of its rank for W − Q. ``code_layer`` goes through
    one such turn itself, base before product, so what is returned is the L that the best turn
    began with, and the base W − L before it is rounded; together they are W.

    Args:
        weight: W, float64 (out, in).
        moment: H = E[x xᵀ] (in, in).
        rank: Of L.
        coding: By GPTQ; the bits of its slot ``base``.
        dtype: Of scales.
        turns: Times that both are found; the first is EoRA's.
        told: Is given tr(E H Eᵀ), E = W − Q − L with L in no codes, after every turn.

    Raises:
        ConfigError: No turn, a rank that there is not, or another rounding than GPTQ.
        NumericsError: The weight or H is not finite.
    """
    if turns < 1:
        raise ConfigError(f"turns must be at least 1, got {turns}")
    if not 0 <= rank <= min(weight.shape):
        raise ConfigError(f"a weight {tuple(weight.shape)} has no correction of rank {rank}")
    if not coding.reads_inputs:
        raise ConfigError(
            f"a correction is fitted to what gptq rounds; rounding={coding.rounding} fits nothing"
        )
    swept, metric = Swept.of(moment, coding), SecondMoment(moment)
    u, v = weight.new_zeros(weight.shape[0], rank), weight.new_zeros(rank, weight.shape[1])
    best, least = LowRank(u, v, base=weight), float("inf")
    for _ in range(turns):
        base = weight - u @ v
        rest = weight - rounded("base", base, coding, dtype, swept).value
        began = LowRank(u, v, base=base)
        u, v, energy = project(rest, metric, rank)
        error = float(energy[rank:].sum())
        told(error)
        if error < least:
            best, least = began, error
    return best
