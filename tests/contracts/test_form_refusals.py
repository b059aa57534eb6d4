"""What config.json may not say of a layer, and what a layer may not store: refused in one line."""

import math
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

from compress_core.folder.swap import swap_layers
from compress_core.forms.kinds import (
    check_parts,
    sizes_of,
    why_not,
)
from tests.contracts.form_cases import INPUTS, OUT, stored

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
