"""Write a compressed model's folder shard by shard, so that the whole model is never in memory.

The folder holds safetensors, the tokenizer's files as they were, a config.json that names every
compressed layer and what it stores, and the modelling code with which plain transformers loads it.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress_core.errors import ModelError
from compress_core.folder.modelling import (
    MODELLING_FILE,
    auto_map,
    modelling_source,
    require_stock_classes,
)
from compress_core.folder.shards import SHARD_BYTES, ShardWriter, new_folder, write_json
from compress_core.folder.swap import check_layers
from compress_core.forms.kinds import SLOTS, check_parts, sizes_of, version_of
from compress_core.forms.part import Entry, Sizes
from compress_core.forms.room import counted
from compress_core.hf.binding import unwrapped
from compress_core.hf.checkpoint import QUANT_METHOD, Checkpoint, tensor_headers, weight_files
from compress_core.hf.companions import copy_companions
from compress_core.types import ModelLayout

_OF_FILES = ("auto_map", "transformers_weights")  # what config.json says of other files


@dataclass(frozen=True)
class CompressedWeights:
    """What one layer stores.

    Attributes:
        name: The layer's name in the causal model, like `model.layers.0.self_attn.q_proj`.
        entry: What config.json says of it, but for a bias that the dense layer lacked.
        tensors: Those of its parts, by the last part of their keys; numbers in any dtype.
        bias: What is added to the layer's bias, (out,), or None.
    """

    name: str
    entry: Entry
    tensors: Mapping[str, Tensor]
    bias: Tensor | None = None


@dataclass(frozen=True)
class FolderCount:
    """What a folder's safetensors hold: numbers, and the bytes they take."""

    parameters: int
    nbytes: int


@dataclass(frozen=True)
class FolderSummary:
    """What was written: the folder, its weight files, its compressed layers, numbers and bytes."""

    folder: Path
    files: tuple[str, ...]
    layers: int
    parameters: int
    nbytes: int


def write_folder(
    target: Path,
    checkpoint: Checkpoint,
    layers: Iterable[CompressedWeights],
    layout: ModelLayout,
    max_shard_bytes: int = SHARD_BYTES,
) -> FolderSummary:
    """Write the compressed model: what `layers` store, and what else the model loads, as it was.

    Keys stay what they are in the dense model's files, less what no transformers understands.

    Args:
        target: The folder to make; it must not exist, or be empty.
        checkpoint: The dense model.
        layers: The compressed layers, in any order; taken one at a time. With none of them the
            folder is a plain dense model.
        layout: What transformers makes of the dense model.
        max_shard_bytes: Upper limit of one weight file, in bytes.

    Raises:
        ModelError: A class is not one of transformers' own, a layer does not fit the checkpoint,
            its entry or the layer whose in-factor it uses, or would not be smaller than the dense
            one, or `target` is in use.
    """
    architecture, base_class = layout.architecture, layout.base_class
    require_stock_classes(architecture, base_class)
    with new_folder(target) as folder:
        writer = ShardWriter(folder, max_shard_bytes)
        modules: dict[str, dict[str, Any]] = {}
        sizes: dict[str, tuple[int, int]] = {}
        replaced: set[str] = set()
        known = {layer.name: (layer.out_features, layer.in_features) for layer in layout.layers}
        for layer in layers:
            weight = layout.stored.get(f"{layer.name}.weight")
            if weight is None or layer.name not in known:
                raise ModelError(f"{checkpoint.folder} has no layer {layer.name}")
            if weight in replaced:
                raise ModelError(f"{layer.name} was given twice")
            sizes[layer.name] = known[layer.name]
            of_layer = sizes_of(*known[layer.name], layer.entry)
            _check(layer, of_layer)
            dtype = checkpoint.torch_dtype(weight)
            stem = unwrapped(weight, layout.wrappers).removesuffix("weight")
            for part, tensor in layer.tensors.items():
                writer.add(stem + part, SLOTS[part].filed(tensor, of_layer, dtype))
            modules[layer.name] = dict(layer.entry)
            replaced.add(weight)
            if layer.bias is not None:
                bias, key = layer.bias.to(torch.float32), layout.stored.get(f"{layer.name}.bias")
                if key is not None:
                    bias, dtype = bias + checkpoint.read(key), checkpoint.torch_dtype(key)
                    replaced.add(key)
                else:
                    modules[layer.name]["bias"] = True
                writer.add(f"{stem}bias", bias.to(dtype))
        try:
            check_layers(modules, sizes)
        except ValueError as error:
            raise ModelError(str(error)) from error
        for key in sorted(set(layout.stored.values()) - replaced):
            writer.add(unwrapped(key, layout.wrappers), checkpoint.read(key))
        files = writer.close()
        copy_companions(checkpoint.folder, folder)
        config = {name: v for name, v in checkpoint.config.items() if name not in _OF_FILES}
        if modules:
            config["quantization_config"] = {
                "quant_method": QUANT_METHOD,
                "format_version": version_of(modules.values()),
                "modules": modules,
            }
            config["auto_map"] = auto_map(architecture, base_class)
            source = modelling_source(architecture, base_class, layout.base_prefix)
            (folder / MODELLING_FILE).write_text(source, encoding="utf-8")
        write_json(folder / "config.json", config)
        count = count_parameters(folder)
    return FolderSummary(target, files, len(modules), count.parameters, count.nbytes)


def count_parameters(folder: Path) -> FolderCount:
    """Count what a model folder's safetensors hold, from their headers: what is stored, once.

    Indices of kept columns count as numbers like all others, places of sparse entries as bytes
    only, codes as the numbers of 16 bits that take the same room; tied tensors are stored once.

    Raises:
        ModelError: The folder has no complete set of weights.
    """
    nbytes, found = 0, []
    for file in weight_files(folder):
        for key, header in tensor_headers(file).items():
            found.append((key, math.prod(header["shape"]), header["dtype"] == "I32"))
            start, end = header["data_offsets"]
            nbytes += end - start
    return FolderCount(counted(found), nbytes)


def _check(layer: CompressedWeights, sizes: Sizes) -> None:
    """Raises ModelError where what a layer stores is not what its entry says."""
    if layer.bias is not None and tuple(layer.bias.shape) != sizes[:1]:
        raise ModelError(
            f"{layer.name} {tuple(sizes[:2])}: a bias of {tuple(layer.bias.shape)} does not fit"
        )
    try:
        check_parts(layer.entry, layer.tensors, sizes)
    except ValueError as error:
        raise ModelError(f"{layer.name} {tuple(sizes[:2])}: {error}") from error
