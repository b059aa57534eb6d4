"""Tensors to named arrays and back: the only place where torch meets the store."""

import numpy as np
import torch
from torch import Tensor

from compress_core.decompose import LowRank
from compress_core.refine.columns import SMALL_INDEX
from compress_core.stats import InputStats, PrefixStats
from compress_core.whiten import Diagonal, Metric, SecondMoment
from storage.artifact import Artifact
from storage.draft import Draft


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
    put_tensor(draft, "u", factors.u.to(dtype))
    if own_v:
        put_tensor(draft, "v", factors.v.to(dtype))
    if factors.columns is not None and factors.index is not None:
        features = factors.v.shape[1] + len(factors.index)
        put_tensor(draft, "columns", factors.columns.to(dtype))
        small = features <= SMALL_INDEX
        put_tensor(draft, "index", factors.index.to(torch.int16 if small else torch.int32))


def get_factors(artifact: Artifact, shared: Artifact | None = None) -> LowRank:
    """Reads a layer's factors; the in-factor from ``shared`` where that is given."""
    u = get_tensor(artifact, "u")
    v = get_tensor(shared or artifact, "v")
    if not artifact.attrs["columns"]:
        return LowRank(u, v)
    index = get_tensor(artifact, "index").to(torch.int64)
    return LowRank(u, v, get_tensor(artifact, "columns"), index)


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
