"""What a layer stores, in which dtype and packed how, and how many numbers that is."""

import torch
from torch import Tensor

from compress_core.decompose import LowRank, coded, in_eight_bits
from compress_core.quantise import Codes
from compress_core.record import Packed, Record
from compress_core.refine.columns import index_cost, index_dtype
from compress_core.sparse import PLACES, Sparse, pack, unpack

CODE_PARTS = ("scale", "codes_out", "codes_in", "rest_out", "rest_in")


def pack_layer(
    factors: LowRank | None, dtype: torch.dtype, dense_cost: int, *, own: bool, eight_bits: bool
) -> Packed:
    """What is kept of a layer, with its rank, columns, entries and numbers.

    Args:
        factors: What it stores; None for the dense weight, of which nothing is kept.
        dtype: That the model is stored in.
        dense_cost: Numbers of the dense weight.
        own: Whether the in-factor is the layer's own, not another one's that it shares.
        eight_bits: Whether factors are stored as 8-bit codes.
    """
    if factors is None:
        return Packed({}, {"rank": None, "columns": 0, "nonzeros": 0, "numbers": dense_cost})
    if eight_bits:
        factors = in_eight_bits(factors, dtype)
    packed = pack_factors(factors, dtype, own=own)
    return Packed(packed.tensors, {**packed.attrs, **stored_numbers(factors, own)})


def unpack_layer(record: Record, shared: Record | None = None) -> LowRank | None:
    """What a layer stores; None where it stays dense.

    Args:
        record: What :func:`pack_layer` kept.
        shared: The record with the in-factor, where that is another layer's.
    """
    return None if record.attrs["rank"] is None else unpack_factors(record, shared)


def stored_numbers(factors: LowRank, own: bool) -> dict[str, int]:
    """Rank, kept columns, sparse entries, and numbers stored.

    In-factors count where they are ``own``, the index of a column as a number, the place of a
    sparse entry not at all, as in the papers: it is in the bytes. Of factors in 8 bits two codes
    count as one number, and a scale as one.
    """
    numbers = factors.u.numel() + (factors.v.numel() if own else 0)
    if factors.codes is not None:
        numbers = factors.codes.numbers
    columns = 0 if factors.index is None else len(factors.index)
    entries = 0 if factors.sparse is None else factors.sparse.nonzeros
    numbers += entries + (0 if factors.bias is None else factors.bias.numel())
    if factors.columns is not None:
        numbers += factors.columns.numel() + columns * index_cost(factors.in_features)
    return {
        "rank": factors.rank,
        "columns": columns,
        "nonzeros": entries,
        "numbers": numbers,
    }


def pack_factors(factors: LowRank, dtype: torch.dtype, *, own: bool = True) -> Packed:
    """A layer's factors in ``dtype``; the in-factor only where it is the layer's ``own``."""
    tensors: dict[str, Tensor] = {}
    if factors.bias is not None:
        tensors["bias"] = factors.bias.to(dtype)
    if factors.codes is not None:
        return Packed(tensors | _code_parts(factors.codes, dtype))
    tensors["u"] = factors.u.to(dtype)
    if own:
        tensors["v"] = factors.v.to(dtype)
    if factors.columns is not None and factors.index is not None:
        tensors["columns"] = factors.columns.to(dtype)
        tensors["index"] = factors.index.to(index_dtype(factors.in_features))
    if factors.sparse is None:
        return Packed(tensors)
    entries = pack_sparse(factors.sparse, dtype)
    return Packed(tensors | dict(entries.tensors), entries.attrs)


def unpack_factors(record: Record, shared: Record | None = None) -> LowRank:
    """The factors that :func:`pack_factors` kept; the in-factor of ``shared`` where given."""
    bias = record.tensor("bias") if "bias" in record.names else None
    if "codes_out" in record.names:
        parts = {name: record.tensor(name) for name in CODE_PARTS if name in record.names}
        return coded(Codes(**parts), bias)
    u, v = record.tensor("u"), (shared or record).tensor("v")
    if "columns" not in record.names:
        return LowRank(u, v, sparse=unpack_sparse(record), bias=bias)
    return LowRank(u, v, record.tensor("columns"), record.tensor("index").to(torch.int64))


def _code_parts(codes: Codes, dtype: torch.dtype) -> dict[str, Tensor]:
    """Codes as they are, scale and rest in ``dtype``."""
    parts = {name: getattr(codes, name) for name in CODE_PARTS}
    return {
        name: part if part.dtype is torch.int8 else part.to(dtype)
        for name, part in parts.items()
        if part is not None
    }


def pack_sparse(sparse: Sparse, dtype: torch.dtype) -> Packed:
    """Entries: values in ``dtype``, places in the smaller of two narrow layouts."""
    tensors = {"sparse_values": sparse.values.to(dtype), **pack(sparse.mask)}
    return Packed(tensors, {"sparse shape": list(sparse.mask.shape)})


def unpack_sparse(record: Record) -> Sparse | None:
    """Entries, or None where there are none."""
    if "sparse shape" not in record.attrs:
        return None
    parts = {name: record.tensor(name) for name in PLACES if name in record.names}
    mask = unpack(parts, *record.attrs["sparse shape"])
    return Sparse(mask, record.tensor("sparse_values"))
