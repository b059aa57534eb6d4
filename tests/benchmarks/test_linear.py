"""A product of low rank in either form against the dense layer, beside the ideal 1/kept."""

import pytest
import torch
from torch import nn

from compress_core.forms.linear import CompressedLinear
from compress_core.forms.products import largest_rank
from compress_core.sparse import pack_bits
from tests.benchmarks.conftest import Bench


@pytest.mark.parametrize("tokens", [1, 512])
@pytest.mark.parametrize("kept", [0.8, 0.6, 0.4])
@pytest.mark.parametrize("size", [512, 2048, 4096])
def test_forward(size: int, kept: float, tokens: int, bench: Bench) -> None:
    """One decoding step (1 token) and a prefill (512) of a square layer, float32, equal numbers."""
    dense = nn.Linear(size, size, bias=False)
    plain, pivot = (layer_of(form, size, kept) for form in ("plain", "pivot"))
    inputs = torch.randn(tokens, size)
    with torch.inference_mode():
        full, of_plain, of_pivot = bench.seconds(
            lambda: dense(inputs),
            lambda: plain(inputs),
            lambda: pivot(inputs),
            rounds=40 if tokens == 1 else 12,
        )
    bench.row(
        benchmark=f"linear {size}x{size} kept {kept}, {tokens} tokens",
        plain_faster_than_dense=f"{full / of_plain:.2f}",
        pivot_faster_than_dense=f"{full / of_pivot:.2f}",
        ideal=f"{1 / kept:.2f}",
        ranks=f"{plain.entry['rank']}, {pivot.entry['rank']}",
    )


def layer_of(form: str, size: int, kept: float) -> CompressedLinear:
    """A layer of random numbers, as many as are kept; its first rows are the pivots."""
    rank = largest_rank(form, int(kept * size * size), size, size)
    layer = CompressedLinear(size, size, {"rank": rank, **says(form)}, bias=False)
    if form == "pivot":
        layer.tensors()["pivot_rows"].copy_(pack_bits(torch.arange(size) < rank))
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=rank**-0.5)
    return layer


def says(form: str) -> dict[str, bool]:
    """What an entry says of a form."""
    return {"pivot": True} if form == "pivot" else {}
