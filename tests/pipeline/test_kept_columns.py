"""One layer with kept columns: what it computes, and that its index is never stale or a float."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress_core.forms.columns import is_index
from compress_core.forms.kinds import pays
from compress_core.forms.linear import CompressedLinear

IN, OUT, RANK = 24, 20, 5


def layer_with(index: list[int], seed: int = 0, inputs: int = IN) -> Any:
    generator = torch.Generator().manual_seed(seed)
    layer = CompressedLinear(inputs, OUT, {"rank": RANK, "columns": len(index)})
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=generator)
        layer.column_index.copy_(torch.tensor(index))
    return layer


def dense(layer: Any) -> Tensor:
    """The weight it stands for, put together column by column."""
    kept = layer.column_index.tolist()
    low = iter((layer.weight @ layer.factor_in).unbind(1))
    exact = iter(layer.columns.unbind(1))
    return torch.stack(
        [next(exact) if i in kept else next(low) for i in range(layer.in_features)], dim=1
    )


def expect(layer: CompressedLinear, x: Tensor) -> None:
    want = nn.functional.linear(x, dense(layer), layer.bias)
    assert torch.allclose(layer(x), want, atol=1e-5)


@pytest.mark.parametrize("index", [[0], [23], [0, 1, 2], [3, 9, 10, 21], list(range(1, 24))])
@pytest.mark.parametrize("shape", [(IN,), (7, IN), (2, 3, IN)])
def test_forward_is_the_dense_product_with_the_columns_put_back(
    index: list[int], shape: tuple[int, ...]
) -> None:
    layer = layer_with(index)
    expect(layer, torch.randn(shape))
    assert torch.allclose(layer.dense_weight(), dense(layer), atol=1e-5)
    assert torch.equal(layer.dense_weight()[:, index], layer.columns)


def test_gradients_are_those_of_the_dense_product() -> None:
    layer, x = layer_with([2, 3, 17]), torch.randn(6, IN, requires_grad=True)
    inputs = [x, *layer.parameters()]
    goal = torch.randn(6, OUT)
    found = torch.autograd.grad((layer(x) * goal).sum(), inputs)
    want = torch.autograd.grad(
        (nn.functional.linear(x, dense(layer), layer.bias) * goal).sum(), inputs
    )
    assert len(found) == 5
    assert all(torch.allclose(f, w, atol=1e-4) for f, w in zip(found, want, strict=True))


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double])
def test_a_cast_leaves_the_index_an_integer(cast: Callable[[nn.Module], nn.Module]) -> None:
    layer = cast(layer_with([2, 3, 17]))
    assert isinstance(layer, CompressedLinear)
    assert layer.column_index.dtype == torch.int32
    assert layer.column_index.tolist() == [2, 3, 17]
    assert layer.columns.dtype == layer.weight.dtype != torch.float32
    assert layer(torch.randn(2, IN, dtype=layer.weight.dtype)).isfinite().all()


@pytest.mark.parametrize(("inputs", "dtype"), [(32767, torch.int16), (32768, torch.int32)])
def test_the_index_is_stored_in_the_narrowest_dtype(inputs: int, dtype: torch.dtype) -> None:
    layer = layer_with([0, inputs - 1], inputs=inputs)
    stored = layer.state_dict()["column_index"]
    assert stored.dtype == dtype and stored.tolist() == [0, inputs - 1]
    x = torch.zeros(2, inputs)
    x[:, [0, 5, -2, -1]] = torch.randn(2, 4)
    expect(layer, x)


def _load(layer: Any, other: Any) -> Any:
    layer.load_state_dict(other.state_dict())
    return layer


def _assign(layer: Any, other: Any) -> Any:
    layer.load_state_dict(other.state_dict(), assign=True)
    return layer


def _write_into(layer: Any, other: Any) -> Any:
    with torch.no_grad():
        layer.column_index.copy_(other.column_index)
    return layer


def _copy_and_load(layer: Any, other: Any) -> Any:
    twin = copy.deepcopy(layer)
    expect(twin, torch.randn(2, IN))
    expect(_load(layer, other), torch.randn(2, IN))  # the copy must not follow the original
    expect(twin, torch.randn(2, IN))
    return _write_into(twin, other)


def _empty(layer: Any, other: Any) -> Any:
    return _load(layer.to("meta").to_empty(device="cpu"), other)


@pytest.mark.parametrize("change", [_load, _assign, _write_into, _copy_and_load, _empty])
@pytest.mark.parametrize("inference", [False, True])
def test_a_changed_index_is_used_at_once(
    change: Callable[[Any, Any], Any], inference: bool
) -> None:
    layer, other = layer_with([1, 5, 6]), layer_with([0, 12, 23], seed=1)
    with torch.inference_mode(inference):
        expect(layer, torch.randn(2, IN))  # so that there is an order to be stale
    changed = change(layer, other)
    assert changed.column_index.tolist() == [0, 12, 23]
    expect(changed, torch.randn(2, IN))


def test_a_layer_used_or_made_in_inference_mode_trains_afterwards() -> None:
    layer = layer_with([1, 5, 6])
    with torch.inference_mode():
        expect(layer, torch.randn(2, IN))
        expect(layer_with([1, 5, 6]), torch.randn(2, IN))
    layer(torch.randn(2, IN, requires_grad=True)).sum().backward()
    assert layer.columns.grad.abs().sum() > 0


def test_the_order_is_not_saved() -> None:
    layer = layer_with([1, 5, 6])
    before, keys = len(pickle.dumps(layer)), list(layer.state_dict())
    expect(layer, torch.randn(2, IN))
    assert len(pickle.dumps(layer)) == before
    assert list(layer.state_dict()) == keys
    assert sorted(keys) == ["bias", "column_index", "columns", "factor_in", "weight"]
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x = torch.randn(2, IN)
    assert torch.equal(loaded(x), layer(x))


def test_it_is_built_empty_on_the_meta_device_and_filled_later() -> None:
    source = layer_with([1, 5, 6])
    with torch.device("meta"):
        layer = CompressedLinear(IN, OUT, {"rank": RANK, "columns": 3})
    assert layer(torch.empty(2, IN, device="meta")).shape == (2, OUT)
    layer.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(2, IN)
    assert torch.equal(layer(x), source(x))


def test_until_it_is_loaded_it_gives_no_result() -> None:
    layer: Any = CompressedLinear(IN, OUT, {"rank": RANK, "columns": 3})
    assert layer.columns.isnan().all() and layer.factor_in.isnan().all()
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        layer(torch.randn(2, IN))


def test_it_compiles_and_exports() -> None:
    layer, x = layer_with([2, 3, 17]), torch.randn(3, IN)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), layer(x), atol=1e-6)
    _write_into(layer, layer_with([0, 12, 23]))
    assert torch.allclose(compiled(x), layer(x), atol=1e-6)
    exported = torch.export.export(layer, (x,))
    assert torch.allclose(exported.module()(x), layer(x), atol=1e-6)


def test_what_pays_counts_the_columns_and_their_index() -> None:
    def with_columns(rank: int, columns: int, sizes: tuple[int, int] = (64, 64)) -> bool:
        return pays(*sizes, {"rank": rank, "columns": columns})

    assert pays(64, 64, {"rank": 31}) and not pays(64, 64, {"rank": 32})
    assert with_columns(28, 5)  # 28 * (64 + 59) + 5 * 65 = 3769
    assert not with_columns(31, 5)  # 31 * 123 + 325 = 4138 of 4096
    assert not pays(64, 64, {"rank": -1})
    assert not with_columns(3, -1) and not with_columns(3, 64)
    assert with_columns(7, 10904, (8, 32767))  # 262132 of 262136
    assert not with_columns(7, 10904, (8, 32768))  # its index is of 32 bits


@pytest.mark.parametrize(
    ("index", "is_one"),
    [
        ([0], True),
        ([3, 7, 23], True),
        ([7, 3], False),
        ([3, 3], False),
        ([-1], False),
        ([24], False),
    ],
)
def test_an_index_is_ascending_and_within_the_inputs(index: list[int], is_one: bool) -> None:
    assert is_index(torch.tensor(index), IN) == is_one
