"""Our own recipe: one price list of all that a layer can store, and what it bought fitted in order.

Nothing in it is trained. Components are those of the two-sided metric (KFAC-SVD, arXiv 2604.00821):
least error where the loss bends most, ‖G^½ (W − W′) H^½‖. Products are in the pivot form (arXiv
2501.19090), numbers in codes of few bits where that is cheaper for what it costs. One budget buys
components and bits over all layers at one slope of predicted KL (``allocate.prices``). Layer by
layer, on inputs behind what is compressed already, what was bought is then fitted towards the dense
model's outputs as in SAES-SVD (arXiv 2602.03051), and rounded as in GPTQ (arXiv 2210.17323).

``kept`` is the share of 16-bit numbers that what is stored takes the room of. ``codes=false`` leaves
every number in 16 bits, for comparison at equal numbers. It reads only what is cached: another
budget divides, fits and rounds again, and decomposes nothing.
"""

from compress_core.allocate.prices import Prices
from compress_core.coding.settings import Coding
from compress_core.fit import Prefix
from compress_core.forms.names import GROUP
from compress_core.method import Method
from compress_core.metric import OutputError
from compress_core.refine.cross_truncation import CrossTruncate
from compress_core.two_sided import TwoSided


def press(
    codes: bool = True,
    group: int = GROUP,
    damp: float = 0.03,
    prefix: str = "layer",
) -> Method:
    """Components and bits from one price list.

    Args:
        codes: Whether numbers may be stored in codes of few bits.
        group: Codes that share a scale.
        damp: Of the predictions: part of G's mean diagonal that is added to its diagonal.
        prefix: Whether inputs are measured again after each "layer" or each "block".

    Raises:
        ConfigError: A value is out of its range.
    """
    return Method(
        "press",
        "components and bits from one price list, fitted behind what is compressed",
        "",
        weighting=OutputError(),
        two_sided=TwoSided(),
        allocate=Prices(damp=damp, codes=codes),
        fit=CrossTruncate(),
        prefix=Prefix(prefix),  # type: ignore[arg-type]  # it checks
        form="auto",
        coding=Coding(0, group) if codes else None,
    )
