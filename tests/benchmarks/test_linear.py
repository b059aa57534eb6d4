"""A compressed linear against the dense one, beside the ideal 1/kept."""

import pytest
import torch
from torch import nn

from compress_core.forms.linear import CompressedLinear
from tests.benchmarks.conftest import Bench


@pytest.mark.parametrize("tokens", [1, 512])
@pytest.mark.parametrize("kept", [0.8, 0.6, 0.4])
def test_forward(kept: float, tokens: int, bench: Bench) -> None:
    """One decoding step (1 token) and a prefill (512 tokens) of a 2048x2048 layer, float32."""
    size = 2048
    rank = int(kept * size * size) // (2 * size)
    dense, compressed = (
        nn.Linear(size, size, bias=False),
        CompressedLinear(size, size, {"rank": rank}, bias=False),
    )
    for parameter in compressed.parameters():
        nn.init.normal_(parameter)
    inputs = torch.randn(tokens, size)
    with torch.inference_mode():
        full, low = bench.seconds(lambda: dense(inputs), lambda: compressed(inputs), rounds=40)
    bench.row(
        benchmark=f"linear 2048x2048 kept {kept}, {tokens} tokens",
        faster_than_dense=f"{full / low:.2f}",
        ideal=f"{1 / kept:.2f}",
    )
