"""W ≈ Q + L: a weight in codes, and a product of low rank for what rounding took away.

As in EoRA (arXiv 2410.21271) L is the best of its rank in the metric H of the outputs, where LQER
(arXiv 2402.02446) scales inputs; as in CALDERA (arXiv 2405.18886) both are found by turns.
"""

from dataclasses import replace

import torch
from torch import Tensor

from compress_core.coding.error import output_error
from compress_core.coding.gptq import Swept
from compress_core.coding.parts import CodedParts, code_layer
from compress_core.coding.settings import Coding
from compress_core.decompose import LowRank, project
from compress_core.errors import ConfigError
from compress_core.metric import SecondMoment


def code_by_turns(
    low: LowRank, moment: Tensor | None, coding: Coding, form: str, dtype: torch.dtype
) -> CodedParts:
    """Rounds what a fit ended with; a whole weight and the product beside it so often by turns.

    In a turn the base Q is W − L by GPTQ, L the product as it was stored before, and then L the
    best of its rank for W − Q, rounded as its slots say. The first turn takes the product as it is
    given: with one of zeros it is EoRA's. The second begins with the best L for W itself, as
    CALDERA's code does, and the others go on from these two in alternation, since now one ends
    lower and now the other.

    Args:
        low: The fit, float64.
        moment: H = E[x xᵀ] (in, in) of the inputs, float64.
        coding: How, with the bits and the turns.
        form: Of the product, a key of ``FORMS``.
        dtype: Of scales, and of numbers that are in no codes.

    Returns:
        Of all turns the one with the least tr(E H Eᵀ), E = W − Q − L as both are stored.

    Raises:
        ConfigError, NumericsError: As :func:`code_layer`; or turns without H.
    """
    if coding.turns == 1 or low.base is None or low.rank == 0:
        return code_layer(low, moment, coding, form, dtype)
    if moment is None or not coding.reads_inputs:
        raise ConfigError(
            f"a base and its correction go by turns in the metric of the inputs, and rounding="
            f"{coding.rounding} fits nothing: leave out turns={coding.turns}"
        )
    target, swept = low.dense(), Swept.of(moment, coding)
    u, v, _ = project(target, SecondMoment(moment), low.rank)
    begun = [low, replace(low, u=u, v=v)]
    found: list[tuple[float, CodedParts]] = []
    for turn in range(coding.turns):
        parts = code_layer(begun[turn % 2], moment, coding, form, dtype, target, swept)
        begun[turn % 2] = replace(low, u=parts.low.u, v=parts.low.v)
        error = output_error(target - parts.low.dense(), moment)
        found = [min([*found, (error, parts)], key=lambda x: x[0])]
    return found[0][1]
