"""How fast a linear is in each dtype that a model may run in, which `--compute auto` chooses by."""

from time import process_time

import pytest
import torch
from torch.nn.functional import linear

from compress_core.compute import COMPUTE
from tests.benchmarks.conftest import Bench

INTO, OUT = 576, 1536  # of SmolLM2
TOKENS = (512, 4096)
LEAST_SECONDS = 1.0  # of a measurement


def operations_per_second(dtype: torch.dtype, tokens: int) -> float:
    """Floating-point operations per CPU second."""
    torch.manual_seed(0)
    x, weight = torch.randn(tokens, INTO, dtype=dtype), torch.randn(OUT, INTO, dtype=dtype)
    linear(x, weight)
    times, begun = 0, process_time()
    while (spent := process_time() - begun) < LEAST_SECONDS:
        linear(x, weight)
        times += 1
    return 2.0 * tokens * INTO * OUT * times / spent


@pytest.mark.parametrize("dtype", ["float64", *(d for d in COMPUTE if hasattr(torch, d))])
def test_linear_by_dtype(dtype: str, bench: Bench) -> None:
    """One row for each dtype."""
    rates = {n: operations_per_second(getattr(torch, dtype), n) / 1e9 for n in TOKENS}
    cells = {f"at_{tokens}_tokens": f"{rate:.0f}" for tokens, rate in rates.items()}
    bench.row(benchmark=f"GFLOP per CPU second, {dtype}", **cells)
