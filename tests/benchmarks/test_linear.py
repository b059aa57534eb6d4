"""What a layer can store against the dense layer: products of low rank, codes, entries."""

import pytest
import torch
from torch import nn

from compress_core.forms.kinds import in_codes, sizes_of
from compress_core.forms.linear import CompressedLinear
from compress_core.forms.names import FULL, GROUP
from compress_core.forms.part import Entry
from compress_core.forms.products import largest_rank
from compress_core.sparse import pack, pack_bits
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


@pytest.mark.parametrize("tokens", [1, 256])
@pytest.mark.parametrize("size", [512, 2048, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stored_forms(dtype: torch.dtype, size: int, tokens: int, bench: Bench) -> None:
    """One decoding step (1 token) and a prefill (256) of a square layer, by what it holds.

    Factors in codes have the rank of those in 16 bits, which keep half; so do the entries.
    """
    product, base = {"rank": size // 4}, {"rank": 0, "base": True}
    layers = {
        "factors": random_layer(dtype, size, product),
        "factors_in_4_bits": random_layer(dtype, size, product, 4),
        "base_in_8_bits": random_layer(dtype, size, base, 8),
        "base_in_4_bits": random_layer(dtype, size, base, 4),
        "entries": random_layer(dtype, size, {"rank": 0, "nonzeros": size * size // 2}),
    }
    dense = nn.Linear(size, size, bias=False, dtype=dtype)
    inputs = torch.randn(tokens, size, dtype=dtype)
    with torch.inference_mode():
        full, *found = bench.seconds(
            *[lambda layer=layer: layer(inputs) for layer in (dense, *layers.values())],
            rounds=20 if tokens == 1 else 12,
        )
    bench.row(
        benchmark=f"{dtype} {size}x{size} by what it holds, {tokens} tokens",
        **{
            f"{name}_faster_than_dense": f"{full / seconds:.3f}"
            for name, seconds in zip(layers, found, strict=True)
        },
    )


def random_layer(dtype: torch.dtype, size: int, entry: Entry, bits: int = FULL) -> CompressedLinear:
    """A layer that holds random numbers, or random codes of so many bits."""
    entry = in_codes(entry, sizes_of(size, size, entry), bits, GROUP)
    layer = CompressedLinear(size, size, entry, bias=False, dtype=dtype)
    for tensor in layer.buffers():
        tensor.random_(0, 256)
    if count := entry.get("nonzeros"):
        mask = (torch.randperm(size * size) < count).view(size, size)
        for name, places in pack(mask).items():
            layer.tensors()[name].copy_(places)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=size**-0.5)
    return layer


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
