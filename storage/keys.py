"""Recipes and their keys: canonical JSON, its sha256, and what changed between two recipes.

A recipe is plain data that says everything that decides an artifact's numbers. Its key must be the
same on every machine and in every process, so only values with one JSON spelling are allowed in it.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final


def canonical_json(value: Any) -> str:
    """Return the one JSON text of plain data: sorted keys, no spaces, ASCII only.

    Tuples are written as lists. `1`, `1.0` and `true` stay different texts.

    Raises:
        TypeError: not str, int, float, bool, None, list, tuple or dict with str keys.
        ValueError: a float that is not finite. Both name the path of the offending value.

    Example:
        >>> canonical_json({"seed": 0, "kept": [0.6, None]})
        '{"kept":[0.6,null],"seed":0}'
    """
    return json.dumps(_plain(value, ()), sort_keys=True, separators=(",", ":"), allow_nan=False)


def recipe_key(recipe: Mapping[str, Any]) -> str:
    """Return the sha256 (64 hex digits) of a recipe's canonical JSON."""
    return hashlib.sha256(canonical_json(recipe).encode()).hexdigest()


def _plain(value: Any, path: tuple[str, ...]) -> Any:
    """Return `value` with mappings as dicts and tuples as lists, or raise with the path."""
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{_dotted(path)} is {value!r}: only finite numbers have a JSON form")
        return float(value)
    if isinstance(value, list | tuple):
        return [_plain(item, (*path, str(index))) for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise TypeError(f"{_dotted(path)} has the key {name!r}: keys must be str")
        return {name: _plain(item, (*path, name)) for name, item in value.items()}
    raise TypeError(
        f"{_dotted(path)} is a {type(value).__module__}.{type(value).__qualname__}: "
        "only str, int, float, bool, None, list, tuple and dict are allowed"
    )


def _dotted(path: tuple[str, ...]) -> str:
    return ".".join(path) or "the value"


class _Absent:
    """The value of a leaf that one of two recipes does not have."""

    def __repr__(self) -> str:
        return "absent"


ABSENT: Final = _Absent()


@dataclass(frozen=True)
class Difference:
    """One leaf in which two recipes differ; a side that lacks it holds `ABSENT`.

    Attributes:
        path: dotted path of the leaf, list positions as numbers ("inputs.weight", "layers.3.rank").
        old: value in the old recipe.
        new: value in the new recipe.
    """

    path: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.path}: {self.old!r} → {self.new!r}"


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """List the leaves in which two recipes differ, in the order of their paths.

    Example:
        >>> [str(d) for d in differences({"seed": 0, "a": 1}, {"seed": 1, "a": 1})]
        ['seed: 0 → 1']
    """
    return list(_compare(_plain(old, ()), _plain(new, ()), ()))


def _compare(old: Any, new: Any, path: tuple[str, ...]) -> Iterator[Difference]:
    if isinstance(old, list) and isinstance(new, list):
        old, new = _by_position(old), _by_position(new)
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys(), key=_natural):
            yield from _compare(old.get(name, ABSENT), new.get(name, ABSENT), (*path, name))
    elif old is ABSENT or new is ABSENT or canonical_json(old) != canonical_json(new):
        yield Difference(".".join(path), old, new)


def _by_position(items: list[Any]) -> dict[str, Any]:
    return {str(index): item for index, item in enumerate(items)}


def _natural(name: str) -> tuple[bool, int, str]:
    """Sort list positions as numbers, so that 2 comes before 10, and names after them."""
    return (False, int(name), "") if name.isdecimal() else (True, 0, name)
