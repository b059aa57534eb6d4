"""Sparse entries in their two ways on the CPU, against the dense layer: where does CSR pay?"""

import pytest
import torch
from torch import nn

from compress_core.hf.sparse_linear import SparseLinear
from compress_core.sparse import pack
from tests.benchmarks.conftest import Bench

TOKENS = (1, 8, 512)


@pytest.mark.parametrize("density", [0.03, 0.1, 0.15, 0.3, 0.6])
@pytest.mark.parametrize("size", [512, 2048])
def test_forward(size: int, density: float, bench: Bench) -> None:
    """Entries alone in float32, kept in CSR and as a dense weight; ratios above 1 are faster."""
    count = int(density * size * size)
    layer = SparseLinear(size, size, 0, count, bias=False)
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
            taken="csr" if layer.multiplies_sparse(torch.device("cpu")) else "whole weight",
        )


def with_way(layer: SparseLinear, csr: bool) -> nn.Module:
    """The same layer, made to go one way."""

    class Forced(SparseLinear):
        def multiplies_sparse(self, device: torch.device) -> bool:
            return csr

    forced = Forced(layer.in_features, layer.out_features, 0, layer.nonzeros, bias=False)
    forced.load_state_dict(layer.state_dict())
    return forced
