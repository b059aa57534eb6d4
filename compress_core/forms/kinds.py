"""The kinds of parts that there are, and what follows from a layer being a sum of some of them."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from compress_core.forms.base import Base
from compress_core.forms.coded import (
    CODES,
    OF_CODES,
    ZEROS,
    CodeLayout,
    Rows,
    decoded,
    outlined,
)
from compress_core.forms.columns import Columns, input_order
from compress_core.forms.eight_bits import EightBits
from compress_core.forms.entries import Entries
from compress_core.forms.factors import Factors
from compress_core.forms.names import FULL, WIDTHS
from compress_core.forms.part import Entry, Kind, Sizes, Slot, Tensors, wider
from compress_core.forms.pivot import Pivot

KINDS: tuple[type[Kind], ...] = (Factors, EightBits, Pivot, Columns, Entries, Base)
_OF_KINDS = {name: slot for kind in KINDS for name, slot in kind.slots.items()}
SLOTS: Mapping[str, Slot] = _OF_KINDS | {
    name + what: Slot(halves=1, dtype=torch.uint8, fill=0)
    for name, slot in _OF_KINDS.items()
    for what in (CODES, ZEROS)
    if slot.along is not None
}
KEYS: Mapping[str, type] = {"bias": bool, "codes": dict, "group": int} | {
    key: of for kind in KINDS for key, of in kind.keys.items()
}
OF_SUMS = 4  # version of the format from which on any kinds may stand together


def kinds_of(entry: Entry) -> tuple[type[Kind], ...]:
    """The kinds of a layer's parts: those that it calls for, and plain factors for a bare rank."""
    called = tuple(kind for kind in KINDS if kind.calls(entry))
    return called if any("rank" in kind.keys for kind in called) else (Factors, *called)


def sizes_of(out_features: int, in_features: int, entry: Entry) -> Sizes:
    """A layer's sizes, with the inputs that its parts do not all read."""
    return Sizes(out_features, in_features, entry.get("columns", 0))


def is_fixed(entry: Entry) -> bool:
    """Whether some of a layer's numbers cannot be trained."""
    return "codes" in entry or any(kind.fixed for kind in kinds_of(entry))


def plain_entry(settings: Any) -> dict[str, Any]:
    """An entry with nothing in it that says nothing, so that equal ones are equal.

    Raises:
        ValueError: It is no entry, or says something of another type than it is.
    """
    if not isinstance(settings, Mapping) or type(settings.get("rank")) is not int:
        raise ValueError(f"an entry is an object with a whole rank, not {settings!r}")
    says = {"rank": settings["rank"]}
    for key, value in settings.items():
        if value is None or value is False or (type(value) is int and value == 0):
            continue
        if key in KEYS and type(value) is not KEYS[key]:
            raise ValueError(f"{key} is of type {KEYS[key].__name__}, not {value!r}")
        says[key] = value
    return says


def version_of(entries: Iterable[Entry]) -> int:
    """The least version of the format that has all of these."""
    found = [1]
    for entry in entries:
        kinds = kinds_of(entry)
        found += [kind.version for kind in kinds]
        found.append(2 if "factor_in" in entry else 1)
        found.append(3 if "bias" in entry or not entry["rank"] else 1)  # older code wants a rank
        found.append(OF_CODES if "codes" in entry else 1)
        found.append(OF_SUMS if len(set(kinds) - {Factors}) > 1 else 1)
    return max(found)


def uncoded_shapes(entry: Entry, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Of every tensor that a layer's parts work with, whether or not it is held in codes."""
    return {
        name: shape for kind in kinds_of(entry) for name, shape in kind.shapes(entry, sizes).items()
    }


def shapes_of(entry: Entry, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Of every tensor that a layer stores but its bias."""
    shapes, layouts = uncoded_shapes(entry, sizes), layouts_of(entry, sizes)
    for name, layout in layouts.items():
        shapes |= layout.shapes(name)
    return shapes


def codable(entry: Entry, sizes: Sizes) -> dict[str, Rows]:
    """Tensors of a layer that may be held in codes, by name; none that is empty."""
    return {
        name: Rows(shape, along)
        for kind in kinds_of(entry)
        for name, shape in kind.shapes(entry, sizes).items()
        if (along := kind.slots[name].along) is not None and min(shape) > 0
    }


def layouts_of(entry: Entry, sizes: Sizes) -> dict[str, CodeLayout]:
    """How the tensors lie that a layer holds in codes, by name."""
    if "codes" not in entry:
        return {}
    rows = codable(entry, sizes)
    return {
        name: CodeLayout(rows[name], bits, entry["group"]) for name, bits in entry["codes"].items()
    }


def in_codes(entry: Entry, sizes: Sizes, bits: int, group: int) -> dict[str, Any]:
    """The same entry with all in codes of some bits that may be; with 16 bits as it is."""
    names = codable(entry, sizes)
    if bits == FULL or not names:
        return dict(entry)
    return {**entry, "codes": dict.fromkeys(names, bits), "group": group}


def numbers_of(entry: Entry, sizes: Sizes) -> int:
    """Numbers that a layer stores, as budgets count, but a bias that the dense one had.

    What is held in codes counts as the numbers of 16 bits that take the same room.
    For layers that share an in-factor ``sizes.out`` is the sum of theirs.
    """
    found = sum(kind.numbers(entry, sizes) for kind in kinds_of(entry))
    for layout in layouts_of(entry, sizes).values():
        found += layout.numbers() - math.prod(layout.of.shape)
    return found + (sizes.out if entry.get("bias") else 0)


def why_not(entry: Entry, sizes: Sizes) -> str | None:
    """What is wrong with a layer's entry; None where nothing is."""
    claimed = Counter(key for kind in kinds_of(entry) for key in kind.keys if key in entry)
    twice = [key for key in claimed if claimed[key] > 1]
    if twice:
        words = " and ".join(kind.words for kind in kinds_of(entry) if twice[0] in kind.keys)
        return f"its {twice[0]} is of {words}: one only"
    others = {"bias", "codes", "group"} if "codes" in entry else {"bias"}
    if odd := sorted(entry.keys() - claimed.keys() - others):
        return f"this code knows no {odd[0]}={entry[odd[0]]!r} beside what else it stores"
    lengths = [length for shape in uncoded_shapes(entry, sizes).values() for length in shape]
    if min(*lengths, sizes.taken) < 0 or sizes.rest < 1:
        return f"({sizes.out}, {sizes.inputs}) cannot store {dict(entry)}"
    if reason := why_no_codes(entry, sizes):
        return reason
    if numbers_of(entry, sizes) >= sizes.dense:
        beside = "".join(
            f" and {words.format(entry[key])}"
            for key, words in (
                ("columns", "{} columns"),
                ("nonzeros", "{} entries"),
                ("base", "a base"),
            )
            if key in entry
        )
        return (
            f"({sizes.out}, {sizes.inputs}) cannot have rank {entry['rank']}{beside}: what is "
            "stored would not be smaller than the dense weight; leave it dense"
        )
    return None


def why_no_codes(entry: Entry, sizes: Sizes) -> str | None:
    """What is wrong with what an entry says of codes; None where nothing is."""
    if "codes" not in entry:
        return None
    may = codable(entry, sizes)
    for name, bits in entry["codes"].items():
        if name not in may:
            return f"it stores no {name} that may be held in codes"
        if type(bits) is not int or bits not in WIDTHS:
            widths = ", ".join(map(str, WIDTHS))
            return f"{name} is in codes of {bits!r} bits; this code knows those of {widths}"
    if not entry["codes"] or entry.get("group", 0) < 1:
        return "codes are of some tensors, in groups of 1 number or more"
    return None


def pays(out_features: int, in_features: int, entry: Entry) -> bool:
    """Whether what a layer stores are fewer numbers than the dense weight."""
    return why_not(entry, sizes_of(out_features, in_features, entry)) is None


def inputs_read(tensors: Tensors, sizes: Sizes) -> dict[str, Any]:
    """Which columns of the weight a kind is about, by what it ``reads``."""
    views: dict[str, Any] = {"all": slice(None), "rest": slice(None)}
    if sizes.taken:
        order = input_order(tensors["column_index"], sizes.inputs)
        views |= {"rest": order[: sizes.rest], "taken": order[sizes.rest :]}
    return views


def pair_of(entry: Entry, tensors: Tensors, sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain factors (out, r) and (r, in) of a layer whose parts are all ``paired``."""
    tensors = decoded(layouts_of(entry, sizes), tensors)
    left, right = [], []
    views = inputs_read(tensors, sizes)
    for kind in kinds_of(entry):
        u, v = kind.pair(tensors, sizes)
        whole = v.new_zeros(len(v), sizes.inputs)
        whole[:, views[kind.reads]] = v
        left.append(u)
        right.append(whole)
    return torch.cat(left, dim=1), torch.cat(right)


def dense_of(entry: Entry, tensors: Tensors, sizes: Sizes) -> torch.Tensor:
    """The dense weight (out, in) that a layer stands for.

    Args:
        entry: What config.json says of it.
        tensors: What it stores.
        sizes: Its own.

    Returns:
        The sum of its parts, put together in a wider dtype than theirs and rounded once.
    """
    tensors = decoded(layouts_of(entry, sizes), tensors)
    dtype = tensors["weight"].dtype
    whole = tensors["weight"].new_zeros(sizes.out, sizes.inputs, dtype=wider(dtype))
    views = inputs_read(tensors, sizes)
    for kind in kinds_of(entry):
        whole[:, views[kind.reads]] += kind.dense(tensors, sizes)
    return whole.to(dtype)


def check_parts(entry: Entry, tensors: Tensors, sizes: Sizes) -> None:
    """Raise ValueError where what a layer stores contradicts itself, or is not what it calls for.

    A tensor that is another layer's, which the entry names under the tensor's own name, may be
    missing.
    """
    wanted = shapes_of(entry, sizes)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in [name for name in wanted if name not in found and name in entry]:
        del wanted[name]
    if found != wanted:
        raise ValueError(f"tensors of {found} are not those of {dict(entry)}, {wanted}")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() != (SLOTS[name].dtype is None):
            raise ValueError(f"{name} is of {tensor.dtype}")
    layouts = layouts_of(entry, sizes)
    for name, layout in layouts.items():
        layout.check(name, tensors)
    outlines = outlined(layouts, tensors)
    for kind in kinds_of(entry):
        kind.check(outlines, sizes)
