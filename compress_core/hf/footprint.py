"""How many bytes a model holds in memory: measured on a loaded one, or known from its folder.

Not what its files take: narrow indices are wider in memory, and layers keep what they derive from
their parts on first use, a sparse layer even a whole dense weight where that is the fastest way.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from compress_core.errors import ModelError
from compress_core.hf.checkpoint import Checkpoint
from compress_core.hf.factored import is_factored
from compress_core.hf.factorise import factorise
from compress_core.hf.layout import load_config, model_dtype
from compress_core.hf.sparse_linear import SparseLinear


def bytes_in_memory(model: nn.Module) -> int:
    """Bytes of parameters, buffers and what layers derived of them, memory that is shared once."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if is_factored(module):
            tensors += _derived(module)
    places = {(t.untyped_storage()._cdata, t.storage_offset()): t.nbytes for t in tensors}
    return sum(places.values())


def expected_bytes(checkpoint: Checkpoint) -> int:
    """What :func:`bytes_in_memory` will find after a forward without gradients on this CPU.

    Reads no weight.

    Args:
        checkpoint: A dense or a compressed model's folder; it loads with ``dtype="auto"``.

    Raises:
        ModelError: The list of compressed layers does not fit the model.
    """
    config = load_config(checkpoint)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=model_dtype(checkpoint, config))
    settings = checkpoint.config.get("quantization_config")
    if settings is not None:
        try:
            factorise(model, settings["modules"], format_version=settings["format_version"])
        except ValueError as error:
            raise ModelError(f"{checkpoint.folder}: {error}") from error
    later = sum(_derived_bytes(module) for module in model.modules())
    return later + sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _derived(module: Any) -> Iterator[Tensor]:
    # Layers of folders in older formats lack these.
    for kept in (getattr(module, "_order", None), getattr(module, "_kept", None)):
        if kept is None:
            continue
        if kept[2].layout is torch.sparse_csr:
            yield from (kept[2].crow_indices(), kept[2].col_indices(), kept[2].values())
        else:
            yield kept[2]


def _derived_bytes(module: nn.Module) -> int:
    if isinstance(module, SparseLinear):
        if not module.multiplies_sparse(torch.device("cpu")):
            return module.out_features * module.in_features * module.sparse_values.dtype.itemsize
        columns = 0 if "sparse_columns" in module.places() else 4 * module.nonzeros
        return 4 * (module.out_features + 1) + columns  # the values' memory is the parameter's own
    if is_factored(module) and module.column_count:
        return 8 * module.in_features
    return 0
