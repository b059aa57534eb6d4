"""What every kind of part, and every sum of some, must keep: what a kind says of itself is true."""

import copy
import pickle

import pytest
import torch
from torch import nn

from compress_core.folder.swap import FORMAT_VERSION, settle_layers, swap_layers
from compress_core.forms.kinds import (
    KINDS,
    SLOTS,
    check_parts,
    codable,
    dense_of,
    kinds_of,
    numbers_of,
    pair_of,
    shapes_of,
    version_of,
    why_not,
)
from compress_core.forms.linear import CompressedLinear
from compress_core.forms.room import bits_of, counted
from tests.contracts.form_cases import CASES, CODED, PLAIN, inputs_of, layer_of, stored, uncoded
from tests.made_codes import coded_of

both = pytest.mark.parametrize("name", CASES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def test_every_kind_has_a_case_and_every_case_is_a_layer_that_pays() -> None:
    found = {kind for name in CASES for kind in kinds_of(stored(name)[0])}
    assert found == set(KINDS)
    for name in CASES:
        entry, _, sizes = stored(name)
        assert why_not(entry, sizes) is None


def test_kinds_have_no_tensor_in_common_but_weight() -> None:
    names = [slot for kind in KINDS for slot in kind.slots if slot != "weight"]
    assert len(names) == len(set(names))
    assert all(kind.words and kind.keys and kind.version <= FORMAT_VERSION for kind in KINDS)


@both
@each_dtype
def test_what_is_stored_is_what_the_kind_says(name: str, dtype: torch.dtype) -> None:
    entry, tensors, sizes = stored(name, dtype)
    assert {key: tuple(t.shape) for key, t in tensors.items()} == shapes_of(entry, sizes)
    for key, tensor in tensors.items():
        assert SLOTS[key].dtype is not None or tensor.dtype is dtype
    check_parts(entry, tensors, sizes)
    found = [(f"x.{key}", t.numel(), t.dtype is torch.int32) for key, t in tensors.items()]
    assert numbers_of(entry, sizes) == counted(found)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    assert bits_of(entry, sizes, 8 * dtype.itemsize) == 8 * nbytes


@pytest.mark.parametrize("name", PLAIN)
def test_a_layer_stands_for_the_sum_of_what_it_was_made_of(name: str) -> None:
    """Codes of 8 bits are off by at most 1/254 of a component's reach."""
    form, content = CASES[name][:2]
    entry, tensors, sizes = stored(name, torch.float64)
    found, wanted = dense_of(entry, tensors, sizes), content.dense()
    loose = 0.05 if form == "eight bits" else 1e-9
    torch.testing.assert_close(found, wanted, rtol=0, atol=loose * float(wanted.abs().max()))


@pytest.mark.parametrize("name", CODED)
def test_codes_stand_for_scale_times_code_minus_zero_in_their_places(name: str) -> None:
    """So a layer in codes is the same layer with these numbers in place of its own."""
    case, (says, whole, sizes) = CASES[name], uncoded(name, torch.float64)
    entry, tensors, _ = stored(name, torch.float64)
    coded = coded_of(whole, says, sizes, entry["codes"], case.group)
    for key, rows in codable(says, sizes).items():
        if key in coded:
            numbers = coded[key].codes.double()
            for place in range(rows.length):
                of = (slice(None), place // case.group)
                numbers[:, place] -= coded[key].zeros[of]
                numbers[:, place] *= coded[key].scales[of]
            whole[key] = rows.tensor(numbers)
            assert whole[key].shape == rows.shape
    assert torch.equal(dense_of(entry, tensors, sizes), dense_of(says, whole, sizes))
    off = dense_of(entry, tensors, sizes) - case.content.dense()
    assert 0 < float(off.norm() / case.content.dense().norm()) < 0.7  # of 2 bits, least of 8


@pytest.mark.parametrize(
    "name", [name for name in CASES if all(kind.paired for kind in kinds_of(stored(name)[0]))]
)
def test_plain_factors_take_the_place_of_what_is_paired(name: str) -> None:
    entry, tensors, sizes = stored(name, torch.float64)
    u, v = pair_of(entry, tensors, sizes)
    assert u.shape[1] == len(v)
    torch.testing.assert_close(u @ v, dense_of(entry, tensors, sizes))


@both
@each_dtype
@pytest.mark.parametrize("gradients", [False, True])
def test_its_forward_is_a_product_with_its_dense_weight(
    name: str, dtype: torch.dtype, gradients: bool
) -> None:
    layer = layer_of(name, dtype).requires_grad_(gradients)
    x = inputs_of(layer, 2, 7)
    wanted = x.double() @ layer.dense_weight().detach().double().T + 1
    rounding = 40 * torch.finfo(dtype).eps
    for _ in range(2):  # the second time with what was kept
        found = layer(x)
        error = (found.detach().double() - wanted).abs().max() / wanted.abs().max()
        assert found.dtype is dtype and float(error) <= rounding


@both
def test_gradients_reach_all_that_can_be_trained_and_nothing_else(name: str) -> None:
    layer = layer_of(name)
    x = inputs_of(layer, 5).requires_grad_()
    layer(x).square().sum().backward()
    assert x.grad is not None
    for part, tensor in layer.named_parameters():
        assert not tensor.numel() or (tensor.grad is not None and bool(tensor.grad.any())), part
    assert all(SLOTS[part].dtype is not None for part, _ in layer.named_buffers())


@both
def test_a_graph_of_it_says_the_same(name: str) -> None:
    layer = layer_of(name)
    x = inputs_of(layer, 3)
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(layer, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(found, layer(x), rtol=1e-5, atol=1e-5)


@both
def test_it_survives_files_copies_and_pickles(name: str) -> None:
    layer = layer_of(name)
    _, tensors, _ = stored(name)
    saved = layer.state_dict()
    assert {key: t.dtype for key, t in saved.items() if key != "bias"} == {
        key: t.dtype for key, t in tensors.items()
    }
    assert all(torch.equal(saved[key], tensor) for key, tensor in tensors.items())
    x = inputs_of(layer, 3)
    wanted = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), wanted)
        assert not list(copy.deepcopy(other).kept_tensors())


@both
def test_what_it_keeps_follows_what_it_is_made_of(name: str) -> None:
    layer = layer_of(name)
    x = inputs_of(layer, 3)
    with torch.no_grad():
        before = layer(x)
        for parameter in layer.parameters():
            parameter.mul_(2)
        after = layer(x)
    assert not torch.equal(before, after)
    wanted = x @ layer.dense_weight().T + 2
    torch.testing.assert_close(after, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@both
def test_bytes_that_it_will_keep_are_known_before(name: str) -> None:
    layer = layer_of(name)
    with torch.no_grad():
        layer(inputs_of(layer, 3))
    own = {t.untyped_storage()._cdata for t in (*layer.parameters(), *layer.buffers())}
    kept = {t.untyped_storage()._cdata: t.nbytes for t in layer.kept_tensors()}
    found = sum(nbytes for memory, nbytes in kept.items() if memory not in own)
    assert found == layer.expected_kept_bytes(torch.device("cpu"))


@both
def test_an_unloaded_layer_gives_no_result(name: str) -> None:
    entry, _, sizes = stored(name)
    layer = CompressedLinear(sizes.inputs, sizes.out, entry)
    try:
        found = layer(torch.ones(1, sizes.inputs))
    except (RuntimeError, ValueError):  # indices that name nothing
        return
    assert bool(found.isnan().all())


@both
def test_a_model_gets_it_and_says_it_again(name: str) -> None:
    entry, tensors, sizes = stored(name)
    model = nn.Sequential(nn.Linear(sizes.inputs, sizes.out))
    swap_layers(model, {"0": entry})
    assert model[0].entry == entry
    model[0].load_state_dict({**tensors, "bias": torch.zeros(sizes.out)})
    settle_layers(model)
    swap_layers(model, {"0": entry})  # what is there already stays
    with pytest.raises(ValueError, match="already"):
        swap_layers(model, {"0": {**entry, "rank": entry["rank"] + 1}})


def test_the_version_is_the_least_that_has_the_parts() -> None:
    versions = {name: version_of([stored(name)[0]]) for name in CASES}
    assert versions["factors"] == 1 and versions["factors and columns"] == 2
    assert versions["eight bits"] == versions["factors and entries"] == 3
    assert versions["pivot"] == versions["columns and entries"] == 4
    assert {versions[name] for name in CODED} == {4}
    assert version_of([{"rank": 1}, {"rank": 1, "factor_in": "x"}]) == 2
    assert version_of([{"rank": 1, "bias": True}]) == 3
    assert version_of([]) == 1


@both
def test_autocast_gives_its_dtype(name: str) -> None:
    layer = layer_of(name)
    x = inputs_of(layer, 3)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = layer(x)
    assert found.dtype is torch.bfloat16
    wanted = layer(x)
    assert float((found - wanted).abs().max()) <= 0.1 * float(wanted.abs().max())
