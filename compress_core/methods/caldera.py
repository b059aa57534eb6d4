"""CALDERA (arXiv 2405.18886): W ≈ Q + L R, a whole weight in few bits and a product to correct it.

From the paper: both parts are fitted in the metric H of the layer's inputs, by turns, each to what
the other leaves; Q column by column, the rest making up (its LDLQ is GPTQ's sweep); L R the best of
its rank, both factors in codes of their own bits; of all turns the one with the least error stays.
2 bits for Q, 4 for the factors and 15 turns are those of the published script. With ``turns=1`` it
is EoRA's closed form (arXiv 2410.21271), and with ``factor_bits=16`` in plain numbers as there;
LQER (arXiv 2402.02446) has a diagonal in place of H.

Deviations: codes are those of ``gptq``, with a scale and a zero for every group, where the paper
has codebooks of the E8 lattice behind a random Hadamard transform; in 2 bits the ends of a group
are drawn in where that has less error (``search``), without which more turns do not help for long;
the factors are rounded by GPTQ, the in-factor once more after the out-factor, where the published
code rounds each to nearest ten times. That code begins with L R of W itself and takes what L R
spans out of H before it rounds Q; here every other turn goes on from such a beginning, the first
and those that go on from it begin with Q, and H stays whole. H is that of the inputs behind what is
compressed already, with 1 % of its mean diagonal added for the rounding; nothing is fine-tuned
afterwards. The paper gives every layer one rank: here ``kept`` is one budget for both parts. Bases
take their codes first, and what is left of the budget buys whole components, of every layer the
same share, so that rows compare with those of other methods at equal bytes. Nothing goes over to a
base of more bits where that would be better.
"""

from compress_core.allocate.corrections import Corrections
from compress_core.coding.settings import Coding
from compress_core.coding.whole import KeepWhole
from compress_core.forms.names import GROUP
from compress_core.method import Method

FACTORS = ("factor_in", "weight", "pivot_in")  # slots of a product in any form


def caldera(
    bits: int = 2,
    factor_bits: int = 4,
    code_group: int = GROUP,
    turns: int = 15,
    damping: float = 0.01,
    order: bool = False,
    search: int = 2,
) -> Method:
    """A rounded weight with a correction of low rank.

    Args:
        bits: Of every code of the whole weight: 8, 6, 5, 4, 3 or 2.
        factor_bits: Of every number of the correction: 16, or 8, 6, 5, 4, 3 or 2 for codes.
        code_group: Codes that share a scale.
        turns: Times that both are fitted to what the other leaves; 1 is EoRA's closed form.
        damping: Part of the mean of H's diagonal that is added to it.
        order: Whether columns are rounded by falling diagonal of H.
        search: Codes of so many bits at most have the ends of a group drawn in where that has
            less error.

    Raises:
        ConfigError: A value is out of its range.
    """
    widths = tuple((slot, factor_bits) for slot in FACTORS)
    return Method(
        "caldera",
        "the whole weight in few bits, and factors for what rounding took, by turns",
        "2405.18886",
        allocate=Corrections(bits, factor_bits),
        decompose=None,
        fit=KeepWhole(),
        coding=Coding(
            0,
            code_group,
            damping=damping,
            search=search,
            order=order,
            widths=widths,
            turns=turns,
        ),
    )
