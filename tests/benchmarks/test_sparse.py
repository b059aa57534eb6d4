"""Sparse entries in their two ways on the CPU, against the dense layer: where does CSR pay?"""

from typing import Any

import pytest
import torch
from torch import nn

from compress_core.forms.linear import CompressedLinear
from compress_core.sparse import pack
from tests.benchmarks.conftest import Bench

TOKENS = (1, 8, 512)


@pytest.mark.parametrize("density", [0.03, 0.1, 0.15, 0.3, 0.6])
@pytest.mark.parametrize("size", [512, 2048])
def test_forward(size: int, density: float, bench: Bench) -> None:
    """Entries alone in float32, kept in CSR and as a dense weight; ratios above 1 are faster."""
    count = int(density * size * size)
    layer: Any = CompressedLinear(size, size, {"rank": 0, "nonzeros": count}, bias=False)
    mask = (torch.randperm(size * size) < count).view(size, size)
    for name, places in pack(mask).items():
        setattr(layer, name, places.to(getattr(layer, name).dtype))
    nn.init.normal_(layer.sparse_values)
    dense = nn.Linear(size, size, bias=False)
    csr, whole = with_way(layer, True), with_way(layer, False)
    for tokens in TOKENS:
        inputs = torch.randn(tokens, size)
        with torch.inference_mode():
            full, sparse, one = bench.seconds(
                lambda: dense(inputs),  # noqa: B023
                lambda: csr(inputs),  # noqa: B023
                lambda: whole(inputs),  # noqa: B023
                rounds=8 if tokens > 8 else 40,
            )
        bench.row(
            benchmark=f"sparse {size}x{size} density {density}, {tokens} tokens",
            csr_faster_than_dense=f"{full / sparse:.2f}",
            whole_weight_faster_than_dense=f"{full / one:.2f}",
            taken="whole weight" if layer.runs_whole(torch.device("cpu")) else "csr",
        )


def with_way(layer: CompressedLinear, csr: bool) -> nn.Module:
    """The same layer, made to go one way."""

    class Forced(CompressedLinear):
        def runs_whole(self, device: torch.device) -> bool:
            return not csr

    forced = Forced(layer.in_features, layer.out_features, layer.entry, bias=False)
    forced.load_state_dict(layer.state_dict())
    return forced
