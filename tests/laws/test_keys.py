"""Laws of recipes: one value, one text, one key; differences name the leaves that differ."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.keys import ABSENT, Difference, canonical_json, differences, recipe_key

FLOATS = st.floats(allow_nan=False, allow_infinity=False)
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), FLOATS, st.text(max_size=5))
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner)
)
RECIPES = st.dictionaries(st.text(max_size=4), VALUES, max_size=4)


def shuffled(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: shuffled(value[name]) for name in reversed(value)}
    return tuple(shuffled(item) for item in value) if isinstance(value, list) else value


@given(RECIPES)
def test_the_key_does_not_depend_on_the_order_of_names_nor_on_list_or_tuple(recipe: dict) -> None:
    assert recipe_key(shuffled(recipe)) == recipe_key(recipe)


@given(RECIPES)
def test_canonical_json_is_json_of_the_same_value(recipe: dict) -> None:
    assert json.loads(canonical_json(recipe)) == recipe


@given(RECIPES, RECIPES)
def test_keys_agree_exactly_when_nothing_differs(one: dict, other: dict) -> None:
    assert (recipe_key(one) == recipe_key(other)) == (not differences(one, other))


@given(RECIPES)
def test_nothing_differs_from_itself(recipe: dict) -> None:
    assert differences(recipe, shuffled(recipe)) == []


def test_the_key_is_the_same_in_another_process() -> None:
    recipe = {"stage": "weigh", "kept": [0.1, 1e-300, -0.0], "name": "σ", "on": True, "n": None}
    code = f"from storage.keys import recipe_key; print(recipe_key({recipe!r}))"
    other = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).resolve().parents[2],
        env={"PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == recipe_key(recipe)
    assert recipe_key({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


def test_one_and_true_and_one_point_zero_are_three_recipes() -> None:
    assert len({recipe_key({"x": x}) for x in (1, 1.0, True, "1")}) == 4


def test_numpy_float64_is_the_python_float_it_equals() -> None:
    assert recipe_key({"x": np.float64(0.1)}) == recipe_key({"x": 0.1})


@pytest.mark.parametrize(
    ("recipe", "error", "message"),
    [
        ({"a": {"b": [1, math.nan]}}, ValueError, r"a\.b\.1 is nan"),
        ({"a": -math.inf}, ValueError, r"a is -inf"),
        ({"a": {"b": {1, 2}}}, TypeError, r"a\.b is a builtins\.set"),
        ({"path": Path("x")}, TypeError, r"path is a pathlib\."),
        ({"x": [np.float32(1)]}, TypeError, r"x\.0 is a numpy\.float32"),
        ({"x": b"raw"}, TypeError, r"x is a builtins\.bytes"),
        ({"x": {3: "three"}}, TypeError, r"x has the key 3"),
    ],
)
def test_what_has_no_single_json_form_is_refused_by_its_path(
    recipe: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        recipe_key(recipe)


def test_differences_name_the_leaves() -> None:
    old = {"seed": 0, "code": {"a.f": "1", "a.g": "2"}, "ranks": [4, 8, 8], "gone": {"x": 1}}
    new = {"seed": 1, "code": {"a.f": "1", "a.g": "3", "a.h": "4"}, "ranks": [4, 9], "same": None}
    assert differences(old, new) == [
        Difference("code.a.g", "2", "3"),
        Difference("code.a.h", ABSENT, "4"),
        Difference("gone", {"x": 1}, ABSENT),
        Difference("ranks.1", 8, 9),
        Difference("ranks.2", 8, ABSENT),
        Difference("same", ABSENT, None),
        Difference("seed", 0, 1),
    ]
    assert str(differences({"seed": 0}, {"seed": 1})[0]) == "seed: 0 → 1"


def test_a_leaf_that_became_a_branch_is_one_difference() -> None:
    assert differences({"a": 1}, {"a": {"b": 1}}) == [Difference("a", 1, {"b": 1})]
