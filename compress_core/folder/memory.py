"""How many bytes a model holds in memory: measured on a loaded one, or known from its folder.

Not what its files take: narrow indices are wider in memory, and layers keep what they derive from
their parts on first use, a sparse layer even a whole dense weight where that is the fastest way.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from compress_core.errors import ModelError
from compress_core.folder.swap import swap_layers
from compress_core.forms.linear import CompressedLinear, is_compressed
from compress_core.hf.checkpoint import Checkpoint
from compress_core.hf.layout import load_config, model_dtype


def bytes_in_memory(model: nn.Module) -> int:
    """Bytes of parameters, buffers and what layers derived of them, memory that is shared once."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if is_compressed(module):
            tensors += module.kept_tensors()
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
            swap_layers(model, settings["modules"], format_version=settings["format_version"])
        except ValueError as error:
            raise ModelError(f"{checkpoint.folder}: {error}") from error
    layers = [module for module in model.modules() if isinstance(module, CompressedLinear)]
    later = sum(layer.expected_kept_bytes(torch.device("cpu")) for layer in layers)
    return later + sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
