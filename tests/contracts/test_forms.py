"""What every kind of part, and every sum of some, must keep: what a kind says of itself is true."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from compress_core.decompose import LowRank
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
    sizes_of,
    version_of,
    why_not,
)
from compress_core.forms.linear import CompressedLinear
from compress_core.forms.room import bits_of, counted
from compress_core.layer.stored import as_parts
from compress_core.sparse import Sparse
from tests.made_codes import coded_of, in_rounded_codes

OUT, INPUTS = 40, 24


class Case(NamedTuple):
    """What a layer is made of, and what of it is in codes: all that may be, or by name."""

    form: str
    content: LowRank
    bits: int | dict[str, int] = 0
    group: int = 32


def made(form: str, rank: int, columns: int = 0, entries: int = 0, **sizes: int) -> LowRank:
    """A layer's content, random, in float64."""
    out, inputs = sizes.get("out", OUT), sizes.get("inputs", INPUTS)
    draw = torch.Generator().manual_seed(rank + 10 * columns + entries + len(form))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    mask = torch.randperm(out * inputs, generator=draw).view(out, inputs) < entries
    index = torch.randperm(inputs, generator=draw)[:columns].sort().values
    return LowRank(
        normal(out, rank),
        normal(rank, inputs - columns),
        normal(out, columns) if columns else None,
        index if columns else None,
        Sparse.of(normal(out, inputs), mask) if entries else None,
        base=normal(out, inputs) if sizes.get("base") else None,
    )


PLAIN: dict[str, Case] = {
    name: Case(form, made(form, *content, **sizes))
    for name, form, content, sizes in (
        ("factors", "plain", (5,), {}),
        ("eight bits", "eight bits", (7,), {}),
        ("eight bits, wide", "eight bits", (7,), {"out": 16, "inputs": 50}),
        ("pivot", "pivot", (13,), {}),
        ("pivot, wide", "pivot", (9,), {"out": 18, "inputs": 50}),
        ("pivot, whole words", "pivot", (11,), {"out": 32}),
        ("columns", "plain", (0, 5), {}),
        ("columns of a wide layer", "plain", (0, 3), {"out": 8, "inputs": 40_000}),
        ("entries as bits", "plain", (0, 0, 300), {}),
        ("entries in rows", "plain", (0, 0, 9), {"inputs": 200}),
        ("factors and columns", "plain", (5, 4), {}),
        ("factors and entries", "plain", (5, 0, 100), {}),
        ("columns and entries", "plain", (0, 4, 100), {}),
        ("factors, columns, entries", "plain", (4, 4, 100), {}),
        ("eight bits and columns", "eight bits", (4, 4), {}),
        ("eight bits and entries", "eight bits", (4, 0, 60), {}),
        ("pivot and columns", "pivot", (6, 4), {}),
        ("pivot and entries", "pivot", (6, 0, 100), {}),
        ("pivot, columns, entries", "pivot", (5, 4, 60), {}),
    )
}
ODD = {"out": 39, "inputs": 25}  # of codes that end within a byte
WITH_BASE = {"base": 1}
CODED: dict[str, Case] = {
    name: Case(form, made(form, *content, **sizes), bits, group)
    for name, form, content, sizes, bits, group in (
        ("factors in codes", "plain", (5,), {}, 8, 32),
        ("factors of high rank in codes", "plain", (27,), ODD, 6, 16),
        ("factors in codes of two widths", "plain", (7,), ODD, {"weight": 3, "factor_in": 5}, 8),
        ("an in-factor in codes", "plain", (7,), {}, {"factor_in": 4}, 32),
        ("pivot in codes", "pivot", (9,), ODD, 6, 8),
        ("pivot in codes, in one group", "pivot", (9,), {}, 4, 1000),
        ("columns in codes", "plain", (0, 5), ODD, 3, 32),
        ("entries in codes", "plain", (0, 0, 300), {}, 8, 32),
        ("entries in rows in codes", "plain", (0, 0, 9), {"inputs": 200}, 3, 4),
        ("factors, columns, entries in codes", "plain", (4, 4, 100), ODD, 6, 16),
        ("base", "plain", (0,), WITH_BASE, 4, 32),
        ("base, in odd groups", "plain", (0,), ODD | WITH_BASE, 3, 7),
        ("base in 2 bits", "plain", (0,), ODD | WITH_BASE, 2, 32),
        ("base of a wide layer", "plain", (0,), {"out": 8, "inputs": 500, "base": 1}, 5, 64),
        ("base and factors", "plain", (3,), ODD | WITH_BASE, 8, 32),
        ("base and factors that are not in codes", "plain", (3,), WITH_BASE, {"base": 4}, 32),
        ("base and pivot", "pivot", (6,), WITH_BASE, 4, 8),
        ("base and eight bits", "eight bits", (3,), WITH_BASE, 4, 16),
        ("base and columns", "plain", (0, 2), WITH_BASE, 4, 16),
        ("base and entries", "plain", (0, 0, 30), WITH_BASE, {"base": 6}, 32),
        ("base, factors, entries", "plain", (2, 0, 50), ODD | WITH_BASE, 4, 32),
        ("all of them", "plain", (2, 2, 50), WITH_BASE, 3, 16),
        (
            "base, factors, entries, in part",
            "plain",
            (2, 0, 50),
            WITH_BASE,
            {"base": 3, "factor_in": 8},
            32,
        ),
    )
}
CASES = PLAIN | CODED
both = pytest.mark.parametrize("name", CASES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def uncoded(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, Any]:
    """Entry, tensors and sizes of a case before anything is in codes."""
    case = CASES[name]
    tensors, entry = as_parts(case.content, dtype, case.form)
    return entry, tensors, sizes_of(len(case.content.u), case.content.in_features, entry)


def stored(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, Any]:
    """Entry, tensors and sizes of a case."""
    entry, tensors, sizes = uncoded(name, dtype)
    case = CASES[name]
    if case.bits:
        tensors, entry = in_rounded_codes(tensors, entry, sizes, case.bits, case.group)
    return entry, tensors, sizes


def layer_of(name: str, dtype: torch.dtype = torch.float32, bias: bool = True) -> CompressedLinear:
    """A loaded layer of a case, with a bias of ones."""
    entry, tensors, sizes = stored(name, dtype)
    layer = CompressedLinear(sizes.inputs, sizes.out, entry, bias, dtype=dtype)
    layer.load_state_dict({**tensors, **({"bias": torch.ones(sizes.out)} if bias else {})})
    layer.settle()
    return layer


def inputs_of(layer: CompressedLinear, *shape: int) -> Tensor:
    """Random inputs for it."""
    draw = torch.Generator().manual_seed(3)
    return torch.randn(*shape, layer.in_features, generator=draw).to(layer.weight.dtype)


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


MESS: list[Any] = [
    *({}, [], "rank", None, 5, {"rank": None}, {"rank": [3]}, {"rank": {}}, {"rank": "3"}),
    *({"rank": 2.5}, {"rank": True}, {"rank": math.inf}, {"rank": 3, "nonzeros": 2.5}),
    *({"rank": 3, "nonzeros": "3"}, {"rank": 3, "nonzeros": True}, {"rank": 3, "nonzeros": [2]}),
    *({"rank": 3, "columns": "x"}, {"rank": 3, "columns": math.nan}, {"rank": 3, "bits": "8"}),
    *({"rank": 3, "factor_in": ["x"]}, {"rank": 3, "factor_in": 7}, {"rank": 3, "pivot": "yes"}),
    *({"rank": 3, "bias": 1}, {"rank": 3, "pivot": {}}, {"rank": 3, 5: 5}, {"rank": -(10**30)}),
    *({"rank": 10**30}, {"rank": 3, "columns": 10**30}, {"rank": 40, "pivot": True}),
    *({"rank": 0, "base": "yes"}, {"rank": 0, "base": 1}, {"rank": 0, "base": True}),
    *({"rank": 3, "group": 32}, {"rank": 3, "codes": 4}, {"rank": 3, "codes": ["weight"]}),
    *(
        {"rank": 3, "group": 32, "codes": codes}
        for codes in (
            *({}, {"weight": 7}, {"weight": 16}, {"weight": "4"}, {"weight": True}, {5: 4}),
            *({"weight": None}, {"weight": [4]}, {"weight": 4.0}, {"base": 4}, {"weight_codes": 4}),
            *({"columns": 4}, {"hoops": 4}, {"weight": math.nan}),
        )
    ),
    *({"rank": 3, "codes": {"weight": 4}, "group": group} for group in (0, -3, None, 2.5, "32")),
    {"rank": 10**30, "codes": {"weight": 2, "factor_in": 2}, "group": 32},
    {"rank": 3, "codes": {"weight": 4}},
    {"rank": 0, "codes": {"weight": 4}, "group": 32},
    {"rank": 3, "bits": 8, "codes": {"weight": 4}, "group": 32},
]


@pytest.mark.parametrize("entry", MESS, ids=str)
def test_whatever_stands_in_a_file_is_refused_in_one_line(entry: Any) -> None:
    model = nn.Sequential(nn.Linear(INPUTS, OUT))
    with pytest.raises(ValueError) as refusal:
        swap_layers(model, {"0": entry})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("version", ["4", None, [1], 2.5, 0, -1, math.nan, True, 10**9])
def test_so_is_a_version_that_is_none(version: Any) -> None:
    with pytest.raises(ValueError, match="format"):
        swap_layers(nn.Sequential(), {}, format_version=version)


@both
def test_autocast_gives_its_dtype(name: str) -> None:
    layer = layer_of(name)
    x = inputs_of(layer, 3)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = layer(x)
    assert found.dtype is torch.bfloat16
    wanted = layer(x)
    assert float((found - wanted).abs().max()) <= 0.1 * float(wanted.abs().max())


DAMAGE: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "factors and columns": ("column_index", lambda t: t.flip(0), "no ascending list"),
    "entries as bits": ("sparse_bits", lambda t: t * 0, "places of 0 entries for 300"),
    "entries in rows": ("sparse_columns", lambda t: t * 0, "named twice"),
    "pivot": ("pivot_rows", lambda t: t * 0, "names 0 rows of 13"),
    "pivot, wide": ("pivot_rows", lambda t: t.flip(0), "names"),
    "base, in odd groups": ("base_codes", lambda t: t | 128, "base_codes has bits behind its end"),
    "base in 2 bits": ("base_zeros", lambda t: t | 128, "base_zeros has bits behind its end"),
    "base": ("base_codes", lambda t: t.int(), "base_codes is of torch.int32, not of bytes"),
    "base and factors": ("base", lambda t: t.int(), "base is of torch.int32"),
    "base and pivot": ("weight_zeros", lambda t: t[1:], "tensors of .* are not those"),
    "entries in codes": ("sparse_bits", lambda t: t * 0, "places of 0 entries for 300"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_integers_that_name_what_is_not_there_are_refused(name: str) -> None:
    part, damage, message = DAMAGE[name]
    entry, tensors, sizes = stored(name)
    tensors[part] = damage(tensors[part])
    with pytest.raises(ValueError, match=message):
        check_parts(entry, tensors, sizes)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"rank": 5, "bits": 4}, "bits=4"),
        (
            {"rank": 5, "bits": 8, "pivot": True},
            "its rank is of factors in 8 bits and factors in pivot",
        ),
        ({"rank": 5, "hoops": 3}, "hoops=3"),
        ({"rank": 5, "pivot": True, "factor_in": "x"}, "factor_in='x'"),
        ({"rank": -1}, "cannot store"),
        ({"rank": 0, "columns": INPUTS}, "cannot store"),
        ({"rank": 15}, "would not be smaller"),
        ({"rank": 24, "pivot": True}, "would not be smaller"),
        ({"rank": 10, "nonzeros": 400}, "rank 10 and 400 entries"),
        ({"rank": 64, "pivot": True}, "cannot store"),
        ({"rank": 0, "base": True}, "rank 0 and a base: what is stored would not be smaller"),
        (
            {"rank": 0, "base": True, "codes": {"base": 8}, "group": 1},
            "rank 0 and a base: what is stored would not be smaller",
        ),
        ({"rank": 5, "codes": {"base": 4}, "group": 8}, "stores no base that may be held in codes"),
        ({"rank": 5, "codes": {"weight": 7}, "group": 8}, "weight is in codes of 7 bits"),
    ],
)
def test_entries_that_nothing_reads_or_that_do_not_pay_are_refused(
    entry: dict[str, Any], message: str
) -> None:
    found = why_not(entry, sizes_of(OUT, INPUTS, entry))
    assert found is not None
    assert any(part in found for part in message.split("|"))
