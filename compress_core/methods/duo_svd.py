"""Duo-SVD (arXiv 2510.19385): some columns are kept as they are, and modules share by measured KL.

From the paper's code: SVD-LLM's truncation at the module's rank; columns by worth ‖E_:j‖² H_jj; Δ
ranks traded for columns at equal storage by golden-section search, taken when the error falls by
more than 1 %; module shares by a knapsack over the KL of the model with one module at each
candidate.

Ours: indices are counted as stored numbers; of all Δ tried the best counts; the knapsack never
overspends (the published one can by two per cent) and its order is fixed. Options:
``refit_columns`` fits the kept columns to the rest's error, ``search=grid`` does not take the error
to have one minimum.
"""

from compress_core.allocate.knapsack import Knapsack
from compress_core.method import Method
from compress_core.metric import OutputError
from compress_core.options import one_of
from compress_core.refine.columns import PreserveColumns


def duo_svd(
    refit_columns: bool = False,
    search: str = "golden",
    accept: float = 0.01,
    probe_windows: int = 32,
) -> Method:
    """Both halves; ``--allocate uniform`` is the columns alone.

    Args:
        refit_columns: Whether kept columns also make up for the factors' error.
        search: Of the number of ranks traded: "golden" or "grid".
        accept: Least relative gain in error for which columns are kept at all.
        probe_windows: Calibration windows on which the modules' KL is measured.

    Raises:
        ConfigError: A value is none of these.
    """
    one_of("method 'duo_svd'", "search", search, ("golden", "grid"))
    return Method(
        "duo_svd",
        "kept columns, and module shares by a knapsack over measured KL",
        "2510.19385",
        weighting=OutputError(),
        allocate=Knapsack(probe_windows=probe_windows),
        fit=PreserveColumns(
            refit=refit_columns,
            search=search,  # type: ignore[arg-type]  # checked above
            accept=accept,
        ),
    )
