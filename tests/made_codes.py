"""Matrices in codes, by rounding alone: for tests of how codes are stored."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compress_core.forms.codes import Coded, groups_of
from compress_core.forms.kinds import codable
from compress_core.forms.part import Sizes
from compress_core.layer.stored import put_codes


def rounded(matrix: Tensor, bits: int, group: int) -> Coded:
    """A matrix (rows, length) in codes that reach from each group's least number to its largest."""
    rows, length = matrix.shape
    scales = matrix.new_empty(rows, groups_of(length, group))
    codes = torch.empty(rows, length, dtype=torch.uint8)
    zeros = torch.empty_like(scales, dtype=torch.uint8)
    for number in range(scales.shape[1]):
        part = slice(number * group, (number + 1) * group)
        low, high = matrix[:, part].amin(1).clamp(max=0), matrix[:, part].amax(1).clamp(min=0)
        scale = ((high - low) / (2**bits - 1)).clamp_min(1e-6)
        zero = (-low / scale).round()
        found = (matrix[:, part] / scale[:, None]).round() + zero[:, None]
        codes[:, part] = found.clamp(0, 2**bits - 1).to(torch.uint8)
        scales[:, number], zeros[:, number] = scale, zero.to(torch.uint8)
    return Coded(scales, codes, zeros)


def coded_of(
    tensors: Mapping[str, Tensor],
    entry: Mapping[str, Any],
    sizes: Sizes,
    bits: Mapping[str, int],
    group: int,
) -> dict[str, Coded]:
    """Some of what a layer stores in codes, scales in the dtype of what they stand for."""
    rows = codable(entry, sizes)
    found = {}
    for name in bits:
        coded = rounded(rows[name].matrix(tensors[name]).double(), bits[name], group)
        found[name] = coded._replace(scales=coded.scales.to(tensors[name].dtype))
    return found


def in_rounded_codes(
    tensors: Mapping[str, Tensor],
    entry: Mapping[str, Any],
    sizes: Sizes,
    bits: int | Mapping[str, int],
    group: int = 32,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a layer stores and its entry, with tensors in codes: those named, or all that may be."""
    named = dict.fromkeys(codable(entry, sizes), bits) if isinstance(bits, int) else bits
    coded = coded_of(tensors, entry, sizes, named, group)
    return put_codes(tensors, entry, sizes, coded, named, group, tensors["weight"].dtype)
