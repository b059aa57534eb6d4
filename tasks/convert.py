"""Tensors to named arrays and back: the only place where torch meets the store."""

import numpy as np
import torch
from torch import Tensor

from compress_core.stats import InputStats
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
    gram = stats.gram.cpu().numpy()
    draft.put("gram", np.concatenate([row[: i + 1] for i, row in enumerate(gram)]))
    put_tensor(draft, "abs_sum", stats.abs_sum)
    draft.attrs["tokens"] = stats.tokens


def get_stats(artifact: Artifact) -> InputStats:
    """Reads a tap's statistics."""
    abs_sum = get_tensor(artifact, "abs_sum")
    packed = artifact.array("gram")
    features = len(abs_sum)
    gram = np.empty((features, features))
    start = 0
    for i in range(features):
        row = packed[start : start + i + 1]
        gram[i, : i + 1] = row
        gram[: i + 1, i] = row
        start += i + 1
    return InputStats(int(artifact.attrs["tokens"]), torch.from_numpy(gram), abs_sum)


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
