"""Tensors to named arrays and back: the only place where torch meets the store."""

import numpy as np
import torch
from torch import Tensor

from compress_core.decompose import LowRank, coded
from compress_core.learn.base import Atoms, Chosen
from compress_core.metric import Diagonal, Metric, SecondMoment
from compress_core.quantise import Codes
from compress_core.refine.columns import SMALL_INDEX
from compress_core.sparse import Sparse, pack, unpack
from compress_core.stats import InputStats, PrefixStats
from storage.artifact import Artifact
from storage.draft import Draft

SPARSE_PLACES = ("sparse_bits", "sparse_columns", "sparse_counts")
CODE_PARTS = ("scale", "codes_out", "codes_in", "rest_out", "rest_in")


def put_tensor(draft: Draft, name: str, tensor: Tensor) -> None:
    """Stores a tensor; bfloat16 keeps its bits."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype is torch.bfloat16:
        draft.put(name, tensor.view(torch.uint16).numpy(), logical_dtype="bfloat16")
    else:
        draft.put(name, tensor.numpy())


def get_tensor(artifact: Artifact, name: str, rows: int | None = None) -> Tensor:
    """Reads a tensor, or its first ``rows`` rows without the rest."""
    tensor = torch.from_numpy(artifact.array(name, rows=rows))
    if artifact.logical_dtype(name) == "bfloat16":
        return tensor.view(torch.bfloat16)
    return tensor


def put_stats(draft: Draft, stats: InputStats) -> None:
    """Stores a tap's statistics; of the symmetric Gram only the lower triangle, row by row."""
    _put_symmetric(draft, "gram", stats.gram)
    put_tensor(draft, "abs_sum", stats.abs_sum)
    draft.attrs["tokens"] = stats.tokens


def get_stats(artifact: Artifact) -> InputStats:
    """Reads a tap's statistics."""
    abs_sum = get_tensor(artifact, "abs_sum")
    gram = _get_symmetric(artifact, "gram", len(abs_sum))
    return InputStats(int(artifact.attrs["tokens"]), gram, abs_sum)


def put_prefix_stats(draft: Draft, stats: PrefixStats) -> None:
    """Stores a tap's statistics behind compressed layers."""
    _put_symmetric(draft, "gram", stats.gram)
    put_tensor(draft, "cross", stats.cross)
    draft.attrs["tokens"] = stats.tokens


def get_prefix_stats(artifact: Artifact) -> PrefixStats:
    """Reads a tap's statistics behind compressed layers."""
    cross = get_tensor(artifact, "cross")
    gram = _get_symmetric(artifact, "gram", len(cross))
    return PrefixStats(int(artifact.attrs["tokens"]), gram, cross)


def _put_symmetric(draft: Draft, name: str, matrix: Tensor) -> None:
    rows = matrix.cpu().numpy()
    draft.put(name, np.concatenate([row[: i + 1] for i, row in enumerate(rows)]))


def _get_symmetric(artifact: Artifact, name: str, features: int) -> Tensor:
    packed = artifact.array(name)
    matrix = np.empty((features, features))
    start = 0
    for i in range(features):
        row = packed[start : start + i + 1]
        matrix[i, : i + 1] = row
        matrix[: i + 1, i] = row
        start += i + 1
    return torch.from_numpy(matrix)


def put_factors(draft: Draft, factors: LowRank, dtype: torch.dtype, *, own_v: bool = True) -> None:
    """Stores a layer's factors in ``dtype``; the in-factor only where it is the layer's ``own``."""
    if factors.bias is not None:
        put_tensor(draft, "bias", factors.bias.to(dtype))
    if factors.codes is not None:
        put_codes(draft, factors.codes, dtype)
        return
    put_tensor(draft, "u", factors.u.to(dtype))
    if own_v:
        put_tensor(draft, "v", factors.v.to(dtype))
    if factors.columns is not None and factors.index is not None:
        features = factors.v.shape[1] + len(factors.index)
        put_tensor(draft, "columns", factors.columns.to(dtype))
        small = features <= SMALL_INDEX
        put_tensor(draft, "index", factors.index.to(torch.int16 if small else torch.int32))
    if factors.sparse is not None:
        put_sparse(draft, factors.sparse, dtype)


def put_codes(draft: Draft, codes: Codes, dtype: torch.dtype) -> None:
    """Stores factors in 8 bits: codes as they are, scale and rest in ``dtype``."""
    for name in CODE_PARTS:
        if (part := getattr(codes, name)) is not None:
            put_tensor(draft, name, part if part.dtype is torch.int8 else part.to(dtype))


def get_codes(artifact: Artifact) -> Codes:
    """Reads factors in 8 bits."""
    parts = {x: get_tensor(artifact, x) for x in CODE_PARTS if x in artifact.names}
    return Codes(**parts)


def put_sparse(draft: Draft, sparse: Sparse, dtype: torch.dtype) -> None:
    """Stores a sparse part: values in ``dtype``, places in the smaller of two narrow layouts."""
    draft.attrs["sparse shape"] = list(sparse.mask.shape)
    put_tensor(draft, "sparse_values", sparse.values.to(dtype))
    for name, tensor in pack(sparse.mask).items():
        put_tensor(draft, name, tensor)


def get_sparse(artifact: Artifact) -> Sparse | None:
    """Reads a sparse part, or None where nothing was put."""
    if "sparse shape" not in artifact.attrs:
        return None
    names = [name for name in SPARSE_PLACES if name in artifact.names]
    parts = {name: get_tensor(artifact, name) for name in names}
    mask = unpack(parts, *artifact.attrs["sparse shape"])
    return Sparse(mask, get_tensor(artifact, "sparse_values"))


def get_factors(artifact: Artifact, shared: Artifact | None = None) -> LowRank:
    """Reads a layer's factors; the in-factor from ``shared`` where that is given."""
    bias = get_tensor(artifact, "bias") if "bias" in artifact.names else None
    if "codes_out" in artifact.names:
        return coded(get_codes(artifact), bias)
    u = get_tensor(artifact, "u")
    v = get_tensor(shared or artifact, "v")
    if not artifact.attrs["columns"]:
        return LowRank(u, v, sparse=get_sparse(artifact), bias=bias)
    index = get_tensor(artifact, "index").to(torch.int64)
    return LowRank(u, v, get_tensor(artifact, "columns"), index)


def get_atoms(artifact: Artifact) -> Atoms:
    """Reads all that a decomposition offers."""
    loss = get_tensor(artifact, "loss")
    ut, v = get_tensor(artifact, "ut"), get_tensor(artifact, "v")
    return Atoms(ut, v, (loss[:-1] - loss[1:])[: len(ut)], get_sparse(artifact))


def put_chosen(draft: Draft, chosen: Chosen) -> None:
    """Stores what was learned of a layer; the entries that stay as bits."""
    draft.attrs["rank"] = None if chosen.index is None else len(chosen.index)
    if chosen.index is None or chosen.scale is None:
        return
    put_tensor(draft, "index", chosen.index.to(torch.int32))
    put_tensor(draft, "scale", chosen.scale.to(torch.float32))
    if chosen.bias is not None:
        put_tensor(draft, "bias", chosen.bias.to(torch.float32))
    if chosen.entries is not None:
        draft.attrs["entries"] = len(chosen.entries)
        draft.put("entries", np.packbits(chosen.entries.cpu().numpy()))


def get_chosen(artifact: Artifact) -> Chosen:
    """Reads what was learned of a layer."""
    if artifact.attrs["rank"] is None:
        return Chosen(None)
    entries = None
    if "entries" in artifact.attrs:
        bits = np.unpackbits(artifact.array("entries"), count=int(artifact.attrs["entries"]))
        entries = torch.from_numpy(bits.astype(bool))
    bias = get_tensor(artifact, "bias") if "bias" in artifact.names else None
    index = get_tensor(artifact, "index").to(torch.int64)
    return Chosen(index, get_tensor(artifact, "scale"), entries, bias)


def put_metric(draft: Draft, metric: Metric) -> None:
    """Stores a metric; of one that is the Gram itself only a description, the Gram being stored."""
    if isinstance(metric, Diagonal):
        put_tensor(draft, "d", metric.d)
        draft.attrs["metric"] = "diagonal"
    elif isinstance(metric, SecondMoment):
        diagonal = metric.h.diagonal()
        draft.attrs |= {
            "metric": "second moment",
            "mean square": float(diagonal.mean()),
            "dead channels": int((diagonal == 0).sum()),
        }
    else:
        raise TypeError(f"metric {type(metric).__name__} has no stored form")


def get_metric(artifact: Artifact) -> Metric:
    """Reads a metric that is stored whole."""
    if artifact.attrs["metric"] != "diagonal":
        raise TypeError(f"a metric of kind {artifact.attrs['metric']!r} is not stored whole")
    return Diagonal(get_tensor(artifact, "d"))
