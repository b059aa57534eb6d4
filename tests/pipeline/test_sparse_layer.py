"""One layer with sparse entries: what it computes in each of its ways, and that none is stale."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress_core.forms.entries import places_of
from compress_core.forms.linear import CompressedLinear, is_compressed
from compress_core.sparse import pack

IN, OUT = 80, 24
CASES = {  # rank, entries, kept columns: in CSR or as a dense weight, places in bits or as columns
    "alone, csr": (0, 30, 0),
    "alone, csr from bits": (0, 150, 0),
    "alone, dense": (0, 900, 0),
    "beside, csr": (5, 30, 0),
    "beside, csr from bits": (5, 200, 0),
    "beside, dense": (5, 900, 0),
    "beside columns, csr": (5, 30, 4),
    "beside columns, csr from bits": (5, 200, 4),
    "beside columns, dense": (5, 900, 4),
    "beside columns alone, csr": (0, 30, 9),
}
by_case = pytest.mark.parametrize("case", CASES)


def empty(case: str) -> Any:
    rank, count, kept = CASES[case]
    return CompressedLinear(IN, OUT, {"rank": rank, "nonzeros": count, "columns": kept})


def layer_with(case: str, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    layer, (_, count, kept) = empty(case), CASES[case]
    mask = (torch.randperm(OUT * IN, generator=generator) < count).view(OUT, IN)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=generator)
        for name, places in pack(mask).items():
            getattr(layer, name).copy_(places)
        if kept:
            layer.column_index.copy_(torch.randperm(IN, generator=generator)[:kept].sort().values)
    return layer


def beside(layer: Any) -> Tensor:
    """What the entries are added to."""
    low = layer.weight @ layer.factor_in
    if "columns" not in layer.parts:
        return low
    kept = layer.column_index.tolist()
    rest = [i for i in range(IN) if i not in kept]
    return torch.cat([low, layer.columns], dim=1)[:, torch.tensor([*rest, *kept]).argsort()]


def dense(layer: Any) -> Tensor:
    """The weight it stands for, put together entry by entry."""
    weight = beside(layer)
    values = iter(layer.sparse_values.unbind())
    if "sparse_bits" in layer.parts:
        bits = layer.sparse_bits.tolist()
        flat = [i for i in range(OUT * IN) if bits[i // 8] >> i % 8 & 1]
    else:
        columns = iter(layer.sparse_columns.tolist())
        flat = [
            row * IN + next(columns)
            for row, count in enumerate(layer.sparse_counts.tolist())
            for _ in range(count)
        ]
    sparse = {place: next(values) for place in flat}
    zero = torch.zeros(())
    return weight + torch.stack([sparse.get(i, zero) for i in range(OUT * IN)]).view(OUT, IN)


def expect(layer: CompressedLinear, x: Tensor) -> None:
    want = nn.functional.linear(x, dense(layer), layer.bias)
    assert torch.allclose(layer(x), want, atol=1e-4)


@by_case
@pytest.mark.parametrize("shape", [(IN,), (1, IN), (7, IN), (2, 3, IN), (0, IN)])
def test_forward_is_the_dense_product(case: str, shape: tuple[int, ...]) -> None:
    layer, x = layer_with(case), torch.randn(shape)
    expect(layer, x)  # with gradients wanted
    assert layer.runs_whole(torch.device("cpu")) == ("csr" not in case)
    assert ("sparse_counts" in layer.parts) == (CASES[case][1] == 30)
    with torch.no_grad():
        expect(layer, x)
        assert layer(x).is_contiguous()
    with torch.inference_mode():
        expect(layer, x)
    assert torch.allclose(layer.dense_weight(), dense(layer), atol=1e-5)
    layer.register_parameter("bias", None)
    with torch.no_grad():
        assert torch.allclose(layer(x), x @ layer.dense_weight().T, atol=1e-4)


@by_case
def test_gradients_are_those_of_the_dense_product(case: str) -> None:
    layer, x = layer_with(case), torch.randn(6, IN, requires_grad=True)
    inputs = [x, *layer.parameters()]
    goal = torch.randn(6, OUT)
    found = torch.autograd.grad((layer(x) * goal).sum(), inputs, materialize_grads=True)
    want = torch.autograd.grad(
        (nn.functional.linear(x, dense(layer), layer.bias) * goal).sum(), inputs
    )
    assert len(found) == 5 + ("columns" in layer.parts)
    assert all(torch.allclose(f, w, atol=1e-4) for f, w in zip(found, want, strict=True))


@by_case
def test_frozen_it_still_passes_gradients_on(case: str) -> None:
    layer, x = layer_with(case).requires_grad_(False), torch.randn(6, IN, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, dense(layer).sum(dim=0).expand(6, IN), atol=1e-4)


@by_case
@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double])
def test_a_cast_leaves_the_places_integers(
    case: str, cast: Callable[[nn.Module], nn.Module]
) -> None:
    first = layer_with(case)
    with torch.no_grad():
        first(torch.randn(2, IN))  # so that there is a weight to be stale
    layer: Any = cast(first)
    x = torch.randn(2, IN, dtype=layer.weight.dtype)
    with torch.no_grad():
        found = layer(x)
        assert found.dtype == layer.sparse_values.dtype == layer.weight.dtype != torch.float32
        want = nn.functional.linear(x.double(), dense(layer.double()), layer.bias)
    assert torch.allclose(found.double(), want, atol=0.5)
    kinds = {name: places.dtype for name, places in places_of(layer.tensors()).items()}
    expected = {"sparse_bits": torch.uint8, "sparse_columns": torch.int32}
    assert all(kind == expected.get(name, torch.int32) for name, kind in kinds.items())


@by_case
def test_autocast(case: str) -> None:
    layer, x = layer_with(case), torch.randn(3, IN)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(x)
    assert torch.allclose(found.float(), layer(x), atol=0.5, rtol=0.1)


def _load(layer: Any, other: Any) -> Any:
    layer.load_state_dict(other.state_dict())
    return layer


def _assign(layer: Any, other: Any) -> Any:
    layer.load_state_dict(other.state_dict(), assign=True)
    return layer


def _write_into(layer: Any, other: Any) -> Any:
    with torch.no_grad():
        for mine, theirs in zip(layer.state_dict(), other.state_dict(), strict=True):
            getattr(layer, mine).copy_(getattr(other, theirs))
    return layer


def _new_memory(layer: Any, other: Any) -> Any:
    for name, buffer in other.named_buffers():
        getattr(layer, name).copy_(buffer)
    for mine, theirs in zip(layer.parameters(), other.parameters(), strict=True):
        mine.data = theirs.data.clone()
    return layer


def _copy_and_load(layer: Any, other: Any) -> Any:
    twin = copy.deepcopy(layer)
    expect(twin, torch.randn(2, IN))
    expect(_load(layer, other), torch.randn(2, IN))  # the copy must not follow the original
    expect(twin, torch.randn(2, IN))
    return _write_into(twin, other)


def _empty(layer: Any, other: Any) -> Any:
    return _load(layer.to("meta").to_empty(device="cpu"), other)


@by_case
@pytest.mark.parametrize(
    "change", [_load, _assign, _write_into, _new_memory, _copy_and_load, _empty]
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_changed_part_is_used_at_once(
    case: str, change: Callable[[Any, Any], Any], mode: Any
) -> None:
    layer, other = layer_with(case), layer_with(case, seed=1)
    with mode():
        expect(layer, torch.randn(2, IN))
    changed = change(layer, other)
    with mode():
        expect(changed, torch.randn(2, IN))
        x = torch.randn(2, IN)
        assert torch.equal(changed(x), other(x))
    expect(changed, torch.randn(2, IN))


@by_case
@pytest.mark.parametrize("foreach", [False, True])
def test_evaluation_between_training_steps_is_of_the_present(case: str, foreach: bool) -> None:
    layer, x = layer_with(case), torch.randn(4, IN)
    rest = dense(layer) == beside(layer)
    optimiser = torch.optim.AdamW(layer.parameters(), lr=0.1, foreach=foreach)
    for _ in range(3):
        with torch.no_grad():
            expect(layer, x)
        layer(x).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    with torch.no_grad():
        expect(layer, x)
        entries = layer.dense_weight() - beside(layer)
    assert torch.allclose(entries[rest], torch.zeros(()), atol=1e-5)  # the places stayed


@by_case
def test_used_or_made_in_inference_mode_it_trains_afterwards(case: str) -> None:
    layer = layer_with(case)
    with torch.inference_mode():
        expect(layer, torch.randn(2, IN))
        expect(layer_with(case), torch.randn(2, IN))
    layer(torch.randn(2, IN, requires_grad=True)).sum().backward()
    assert layer.sparse_values.grad is not None
    assert layer.sparse_values.grad.abs().sum() > 0


@by_case
def test_what_is_kept_is_neither_saved_nor_copied(case: str) -> None:
    layer = layer_with(case)
    before, keys = len(pickle.dumps(layer)), list(layer.state_dict())
    x = torch.randn(2, IN)
    with torch.no_grad():
        want = layer(x)
    assert len(pickle.dumps(layer)) == before
    assert list(layer.state_dict()) == keys
    places = {"sparse_columns", "sparse_counts"} if CASES[case][1] == 30 else {"sparse_bits"}
    places |= {"columns", "column_index"} if "columns" in layer.parts else set()
    assert set(keys) == {"bias", "factor_in", "weight", "sparse_values"} | places
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (torch.load(file, weights_only=False), copy.deepcopy(layer)):
        with torch.no_grad():
            assert torch.equal(other(x), want)


def test_csr_takes_the_memory_of_the_values() -> None:
    layer = layer_with("beside, csr")
    with torch.no_grad():
        layer(torch.randn(2, IN))
    _, columns, values = layer.kept_tensors()
    assert values.data_ptr() == layer.sparse_values.data_ptr()
    assert columns.data_ptr() == layer.sparse_columns.data_ptr()


@by_case
def test_it_is_built_empty_on_the_meta_device_and_filled_later(case: str) -> None:
    source = layer_with(case)
    with torch.device("meta"):
        layer = empty(case)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            assert layer(torch.empty(2, IN, device="meta")).shape == (2, OUT)
    layer.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(2, IN)
    assert torch.equal(layer(x), source(x))


@by_case
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_until_it_is_loaded_it_gives_no_result(case: str, mode: Any) -> None:
    layer = empty(case)
    assert layer.sparse_values.isnan().all()
    kinds = (ValueError, RuntimeError, IndexError)
    with mode(), pytest.raises(kinds, match=r"values|rows that count|out of bounds"):
        layer(torch.randn(2, IN))


@by_case
@pytest.mark.parametrize("gradients", [False, True])
def test_it_compiles_and_exports(case: str, gradients: bool) -> None:
    layer, x = layer_with(case), torch.randn(3, IN)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(gradients):
        assert torch.allclose(compiled(x), layer(x), atol=1e-4)
        _write_into(layer, layer_with(case, seed=1))
        assert torch.allclose(compiled(x), layer(x), atol=1e-4)
        exported = torch.export.export(layer, (x,))
        assert torch.allclose(exported.module()(x), layer(x), atol=1e-4)
    if gradients:
        compiled(x).sum().backward()
        found = [parameter.grad for parameter in layer.parameters()]
        layer.zero_grad()
        layer(x).sum().backward()
        for one, parameter in zip(found, layer.parameters(), strict=True):
            two = parameter.grad
            assert one is two is None or torch.allclose(one, two, atol=1e-4)


@by_case
def test_results_repeat(case: str) -> None:
    layer, x = layer_with(case), torch.randn(9, IN)
    with torch.no_grad():
        first = layer(x)
        assert all(torch.equal(copy.deepcopy(layer)(x), first) for _ in range(3))


def test_nothing_at_all_gives_the_bias() -> None:
    for bias in (False, True):
        layer = CompressedLinear(IN, OUT, {"rank": 0}, bias=bias)
        want = torch.zeros(OUT)
        if bias:
            nn.init.normal_(layer.bias)
            want = layer.bias.detach()
        x = torch.randn(3, IN, requires_grad=True)
        assert torch.equal(layer(x), want.expand(3, OUT))
        layer(x).sum().backward()
        assert torch.equal(layer.dense_weight(), torch.zeros(OUT, IN))


def test_it_is_found_among_the_compressed() -> None:
    layer = layer_with("alone, dense")
    assert is_compressed(layer) and isinstance(layer, nn.Linear)
    assert repr(layer).endswith("rank=0, nonzeros=900, bias=True)")
