"""Layers of every kind of part, alone and in sums, in codes and not, for what all must keep."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from compress_core.decompose import LowRank
from compress_core.forms.kinds import (
    sizes_of,
)
from compress_core.forms.linear import CompressedLinear
from compress_core.layer.stored import as_parts
from compress_core.sparse import Sparse
from tests.made_codes import in_rounded_codes

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
