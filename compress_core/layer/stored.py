"""What a layer stores: the parts that a fit ended with, as tensors of its file and their entry."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compress_core.coding.parts import CodedParts
from compress_core.decompose import LowRank
from compress_core.forms.base import Base
from compress_core.forms.codes import Coded
from compress_core.forms.columns import Columns
from compress_core.forms.entries import Entries
from compress_core.forms.kinds import (
    SLOTS,
    dense_of,
    layouts_of,
    numbers_of,
    sizes_of,
    why_no_codes,
)
from compress_core.forms.names import PLAIN
from compress_core.forms.part import Entry, Sizes
from compress_core.forms.products import product_form
from compress_core.record import Packed, Record
from compress_core.sparse import Sparse, unpack

BIAS = "bias"  # added to the layer's own


def pack_layer(
    factors: LowRank | CodedParts | None,
    dtype: torch.dtype,
    dense_cost: int,
    *,
    own: bool,
    form: str = PLAIN,
) -> Packed:
    """What is kept of a layer, with its entry, rank, columns, entries and numbers.

    Args:
        factors: What it stores; None for the dense weight, of which nothing is kept.
        dtype: That the model is stored in.
        dense_cost: Numbers of the dense weight.
        own: Whether the in-factor is the layer's own, not another one's that it shares.
        form: Of the product, a key of ``FORMS``.

    Raises:
        ValueError: As :func:`put_codes`; or a layer in codes shares another one's in-factor.
    """
    if factors is None:
        return Packed({}, {"rank": None, "columns": 0, "nonzeros": 0, "numbers": dense_cost})
    if isinstance(factors, CodedParts):
        if not own:
            raise ValueError("a layer that shares another one's in-factor holds nothing in codes")
        (tensors, entry), factors = coded_parts(factors, dtype), factors.low
    else:
        tensors, entry = as_parts(factors, dtype, form)
    sizes = sizes_of(factors.u.shape[0], factors.in_features, entry)
    numbers = numbers_of(entry, sizes)
    if factors.bias is not None:
        tensors[BIAS] = factors.bias.to(dtype)
        numbers += factors.bias.numel()
    if not own:
        for name in [name for name in tensors if name in SLOTS and SLOTS[name].shared]:
            numbers -= tensors.pop(name).numel()
    counts = {"columns": 0, "nonzeros": 0} | entry
    known = {"entry": entry, "sizes": [sizes.out, sizes.inputs], **counts, "numbers": numbers}
    return Packed(tensors, known)


def as_parts(
    factors: LowRank, dtype: torch.dtype, form: str = PLAIN
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a fit ended with as the tensors of its parts, numbers in ``dtype``, and their entry."""
    columns = 0 if factors.index is None else len(factors.index)
    shape = factors.u.shape[0], factors.in_features
    kind, entry = product_form(form, factors.rank, *shape, columns)
    tensors = kind.pack(factors.u, factors.v, dtype)
    if factors.columns is not None and factors.index is not None:
        tensors |= Columns.pack(factors.columns, factors.index)
        entry |= {"columns": columns}
    if factors.sparse is not None and factors.sparse.nonzeros:
        tensors |= Entries.pack(factors.sparse.mask, factors.sparse.values)
        entry |= {"nonzeros": factors.sparse.nonzeros}
    if factors.base is not None:
        tensors |= Base.pack(factors.base)
        entry |= {"base": True}
    sizes = sizes_of(*shape, entry)
    filed = {name: SLOTS[name].filed(tensor, sizes, dtype) for name, tensor in tensors.items()}
    return filed, entry


def coded_parts(parts: CodedParts, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of parts that are in codes, numbers and scales in ``dtype``, and their entry."""
    bits = {name: parts.coding.bits_of(name) for name in parts.codes}
    sizes = sizes_of(parts.low.u.shape[0], parts.low.in_features, parts.entry)
    tensors = {
        name: SLOTS[name].filed(tensor, sizes, dtype) for name, tensor in parts.tensors.items()
    }
    return put_codes(tensors, parts.entry, sizes, parts.codes, bits, parts.coding.group, dtype)


def put_codes(
    tensors: Mapping[str, Tensor],
    entry: Entry,
    sizes: Sizes,
    coded: Mapping[str, Coded],
    bits: Mapping[str, int],
    group: int,
    dtype: torch.dtype,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a layer stores and its entry, with some of its tensors in codes.

    Args:
        tensors: What it stores without those, or with.
        entry: What is said of it then.
        sizes: Its own.
        coded: Name of a tensor to what takes its place: of the matrix that ``codable`` makes of it,
            the scales in any dtype.
        bits: Of the codes of each.
        group: Neighbours in a row of those matrices that share a scale.
        dtype: Of the scales in the file.

    Raises:
        ValueError: A tensor cannot be held in codes, or not in these.
    """
    if not coded:
        return dict(tensors), dict(entry)
    says = {**entry, "codes": {name: bits.get(name) for name in coded}, "group": group}
    if reason := why_no_codes(says, sizes):
        raise ValueError(reason)
    found = dict(tensors)
    for name, layout in layouts_of(says, sizes).items():
        found |= layout.encode(name, coded[name]._replace(scales=coded[name].scales.to(dtype)))
    return found, says


def tensors_of(record: Record, shared: Record | None = None) -> dict[str, Tensor]:
    """The tensors that :func:`pack_layer` kept, the bias among them.

    Args:
        record: What was kept.
        shared: The record with the in-factor, where that is another layer's.
    """
    found = {name: record.tensor(name) for name in record.names}
    if shared is not None:
        names = [name for name in shared.names if name in SLOTS and SLOTS[name].shared]
        found |= {name: shared.tensor(name) for name in names}
    return found


def stored_weight(record: Record, shared: Record | None = None) -> Tensor | None:
    """The dense weight (out, in) that a layer's parts stand for; None where it stays dense."""
    if record.attrs["rank"] is None:
        return None
    out_features, in_features = record.attrs["sizes"]
    entry, tensors = record.attrs["entry"], tensors_of(record, shared)
    return dense_of(entry, tensors, sizes_of(out_features, in_features, entry))


def pack_sparse(sparse: Sparse, dtype: torch.dtype) -> Packed:
    """Entries: values in ``dtype``, places in the smaller of two narrow layouts."""
    tensors = Entries.pack(sparse.mask, sparse.values.to(dtype))
    return Packed(tensors, {"sparse shape": list(sparse.mask.shape)})


def unpack_sparse(record: Record) -> Sparse | None:
    """Entries, or None where there are none."""
    if "sparse shape" not in record.attrs:
        return None
    parts = {name: record.tensor(name) for name in Entries.slots if name in record.names}
    mask = unpack(parts, *record.attrs["sparse shape"])
    return Sparse(mask, record.tensor("sparse_values"))
