"""Our own recipe: one price list of all that a layer can store, and what it bought fitted in order.

Nothing in it is trained. Components are those of the two-sided metric (OBD-LLM, arXiv 2604.00821;
KFAC-SVD): least error where the loss bends most, ‖G^½ (W − W′) H^½‖. Products are in the pivot form
(PIFA, arXiv 2501.19090). In place of components a layer may be of single entries, weighed by the
same curvature (SparseGPT, arXiv 2301.00774, with G's diagonal), and numbers are in codes of few
bits where that is cheaper for what it costs. One budget buys components, entries and bits over all
layers at one slope of predicted KL (``allocate.prices``). Layer by layer, on inputs behind what is
compressed already, what was bought is then fitted towards the dense model's outputs as in SAES-SVD
(arXiv 2602.03051), and rounded as in GPTQ (arXiv 2210.17323).

``kept`` is the share of 16-bit numbers that what is stored takes the room of, places of entries
among it. ``bits=16`` leaves every number in 16 bits, for comparison at equal numbers; most layers
are then of entries, which cost half the error of components or less: it is a pruner there, and
``entries=false`` is what low rank alone can do. ``columns=true`` sells columns, too: those go that
the others make up for at least cost (ZipLM, arXiv 2302.04089, with G). They gain 2 to 3 % where
babyllama-1m is cut most, lose 1 % at 3 bits and are hardly chosen elsewhere, and predicting them
costs a sweep of every layer, so that they are not sold unless asked for. It reads only what is
cached: another budget divides, fits and rounds again, and decomposes nothing.
"""

from compress_core.allocate.prices import Prices
from compress_core.coding.settings import Coding
from compress_core.fit import Prefix
from compress_core.forms.names import FULL, GROUP
from compress_core.method import Method
from compress_core.metric import OutputError
from compress_core.metric_names import METRIC, METRIC_NAMES, TWO_SIDED
from compress_core.options import one_of
from compress_core.prune.columns import FitColumns, PrefixFitColumns
from compress_core.prune.fitted import FitEntries, PrefixFitEntries
from compress_core.refine.cross_truncation import CrossTruncate
from compress_core.two_sided import TwoSided

SEARCHED = 2  # bits: with 3 and more the ends that have less error have more KL


def press(
    bits: int = 0,
    code_group: int = GROUP,
    damp: float = 0.03,
    metric: str = TWO_SIDED,
    metric_damp: float = 0.3,
    correct: bool = True,
    entries: bool = True,
    columns: bool = False,
    prefix: str = "layer",
) -> Method:
    """Components, entries and bits from one price list.

    Args:
        bits: Of every number: 0 for what pays, 16 for no codes, or one width for all.
        code_group: Codes that share a scale.
        damp: Of the predictions: part of G's mean diagonal that is added to its diagonal.
        metric: In which components are least in error: "two_sided", or of the "inputs".
        metric_damp: The same part for a metric of two sides; on models of about a million
            parameters better than the 0.1 of ``metric=two_sided``.
        correct: Whether layers are fitted towards the dense model behind what is compressed.
        entries: Whether a layer may be of entries in place of components. On a CPU entries take
            about the time of the dense weight, whatever their number.
        columns: Whether a layer may be of some of its columns in place of components: it reads
            only these inputs, and is a smaller dense product.
        prefix: Whether inputs are then measured again after each "layer" or each "block".

    Raises:
        ConfigError: A value is out of its range.
    """
    one_of("method 'press'", METRIC, metric, METRIC_NAMES)
    return Method(
        "press",
        "components, entries and bits from one price list, fitted behind what is compressed",
        "",
        weighting=OutputError(),
        two_sided=TwoSided(metric_damp) if metric == TWO_SIDED else None,
        allocate=Prices(damp=damp, codes=bits == 0, entries=entries, columns=columns),
        fit=CrossTruncate() if correct else None,
        entries=(PrefixFitEntries() if correct else FitEntries()) if entries else None,
        columns=(PrefixFitColumns() if correct else FitColumns()) if columns else None,
        prefix=Prefix(prefix),  # type: ignore[arg-type]  # it checks
        coding=None if bits == FULL else Coding(bits, code_group, search=SEARCHED, order=True),
    )
