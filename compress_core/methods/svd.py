"""Plain truncated SVD of every weight: the baseline that knows nothing of the data."""

from compress_core.method import Method


def svd() -> Method:
    """Keeps the largest singular values of W (Eckart–Young); uniform ranks."""
    return Method("svd", "largest singular values of W, no calibration", "")
