"""Tensors from the model's files and from the store, and into it: where torch meets both."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from compress_core.hf.checkpoint import Checkpoint
from compress_core.layer.make import dense_weight
from compress_core.record import Packed
from compress_core.types import LayerRef
from storage.artifact import Artifact
from storage.draft import Draft
from tasks.engine.job import Job


def put(draft: Draft, packed: Packed) -> None:
    """Stores a record."""
    for name, tensor in packed.tensors.items():
        put_tensor(draft, name, tensor)
    draft.attrs |= packed.attrs


def put_tensor(draft: Draft, name: str, tensor: Tensor) -> None:
    """Stores a tensor; bfloat16 keeps its bits."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype is torch.bfloat16:
        draft.put(name, tensor.view(torch.uint16).numpy(), logical_dtype="bfloat16")
    else:
        draft.put(name, tensor.numpy())


class Stored:
    """A record that is read from the store.

    Args:
        artifact: What holds it.
    """

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact

    @property
    def names(self) -> Collection[str]:
        """Names of its tensors."""
        return self.artifact.names

    @property
    def attrs(self) -> Mapping[str, Any]:
        """Its words and numbers."""
        return self.artifact.attrs

    def tensor(self, name: str, rows: int | None = None) -> Tensor:
        """A tensor, or its first ``rows`` rows without the rest."""
        return get_tensor(self.artifact, name, rows)


def dense_weight_of(job: Job, layer: LayerRef) -> Tensor:
    """A layer's dense weight (out, in), in the dtype it is stored in."""
    checkpoint: Checkpoint = job.model.checkpoint
    return dense_weight(checkpoint.read(job.model.weight_key(layer.name)), layer)


def get_tensor(artifact: Artifact, name: str, rows: int | None = None) -> Tensor:
    """Reads a tensor, or its first ``rows`` rows without the rest."""
    tensor = torch.from_numpy(artifact.array(name, rows=rows))
    if artifact.logical_dtype(name) == "bfloat16":
        return tensor.view(torch.bfloat16)
    return tensor
