"""Write a compressed model's folder shard by shard, so that the whole model is never in memory.

The folder holds safetensors, the tokenizer's files as they were, a config.json that names every
compressed layer and what it stores, and the modelling code with which plain transformers loads it.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress_core.errors import ModelError
from compress_core.hf.binding import unwrapped
from compress_core.hf.checkpoint import QUANT_METHOD, Checkpoint, tensor_headers, weight_files
from compress_core.hf.companions import copy_companions
from compress_core.hf.factored import index_dtype, is_column_index
from compress_core.hf.factorise import FORMAT_VERSION, check_layers
from compress_core.hf.modelling import (
    MODELLING_FILE,
    auto_map,
    modelling_source,
    require_stock_classes,
)
from compress_core.hf.quantised_linear import BITS
from compress_core.hf.shards import SHARD_BYTES, ShardWriter, new_folder, write_json
from compress_core.quantise import CODES, Codes
from compress_core.sparse import PLACES, Sparse, pack
from compress_core.types import ModelLayout

_OF_FILES = ("auto_map", "transformers_weights")  # what config.json says of other files


@dataclass(frozen=True)
class FactoredWeights:
    """What one layer stores.

    Attributes:
        name: The layer's name in the causal model, like `model.layers.0.self_attn.q_proj`.
        u: The out-factor, (out, rank).
        v: The in-factor, (rank, in - c); not stored, and may be None, where another's is used.
        columns: The c columns of the weight that are kept, (out, c), or None.
        column_index: The inputs they belong to, (c,), ascending integers, or None.
        shared_with: The name of the layer whose in-factor this one uses, or None for its own.
        sparse: Entries (out, in) that are added to the product; None, or one without any, for none.
        bias: What is added to the layer's bias, (out,), or None.
        codes: What stands for u and v in 8 bits and is stored in their place, or None.
    """

    name: str
    u: Tensor
    v: Tensor | None
    columns: Tensor | None = None
    column_index: Tensor | None = None
    shared_with: str | None = None
    sparse: Sparse | None = None
    bias: Tensor | None = None
    codes: Codes | None = None

    @property
    def entry(self) -> dict[str, Any]:
        """What config.json says of the layer, but for a bias that the dense layer lacked."""
        entry: dict[str, Any] = {"rank": self.u.shape[1]}
        if self.columns is not None:
            entry["columns"] = self.columns.shape[1]
        if self.shared_with is not None:
            entry["factor_in"] = self.shared_with
        if self.sparse is not None and self.sparse.nonzeros:
            entry["nonzeros"] = self.sparse.nonzeros
        if self.codes is not None:
            entry["bits"] = BITS
        return entry

    def tensors(self, dtype: torch.dtype, in_features: int) -> Iterator[tuple[str, Tensor]]:
        """What is stored beside the bias, by the last part of its key, numbers in `dtype`."""
        if self.codes is not None:
            yield from _code_tensors(self.codes, dtype)
            return
        yield "weight", self.u.to(dtype)
        if self.v is not None and self.shared_with is None:
            yield "factor_in", self.v.to(dtype)
        if self.columns is not None and self.column_index is not None:
            yield "columns", self.columns.to(dtype)
            yield "column_index", self.column_index.to(index_dtype(in_features))
        if self.sparse is not None and self.sparse.nonzeros:
            yield "sparse_values", self.sparse.values.to(dtype)
            yield from pack(self.sparse.mask).items()


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
    layers: Iterable[FactoredWeights],
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
        max_shard_bytes: Upper limit of one weight file, and so of the memory held, in bytes.

    Raises:
        ModelError: A class is not one of transformers' own, a layer does not fit the checkpoint or
            the layer whose in-factor it uses, or would not be smaller than the dense one, or
            `target` is in use.
    """
    architecture, base_class = layout.architecture, layout.base_class
    require_stock_classes(architecture, base_class)
    with new_folder(target) as folder:
        writer = ShardWriter(folder, max_shard_bytes)
        modules: dict[str, dict[str, Any]] = {}
        sizes: dict[str, tuple[int, int]] = {}
        replaced: set[str] = set()
        for layer in layers:
            sizes[layer.name] = _checked_sizes(layer, checkpoint, layout, replaced)
            weight = layout.stored[f"{layer.name}.weight"]
            dtype = checkpoint.torch_dtype(weight)
            stem = unwrapped(weight, layout.wrappers).removesuffix("weight")
            for part, tensor in layer.tensors(dtype, sizes[layer.name][1]):
                writer.add(stem + part, tensor)
            modules[layer.name] = layer.entry
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
                "format_version": FORMAT_VERSION,
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
    only, two 8-bit codes of factors as one number; tied tensors are stored once.

    Raises:
        ModelError: The folder has no complete set of weights.
    """
    parameters = codes = nbytes = 0
    for file in weight_files(folder):
        for name, entry in tensor_headers(file).items():
            part, size = name.rpartition(".")[2], math.prod(entry["shape"])
            if part in CODES:
                codes += size
            elif part not in PLACES:
                parameters += size
            start, end = entry["data_offsets"]
            nbytes += end - start
    return FolderCount(parameters + codes // 2, nbytes)


def _checked_sizes(
    layer: FactoredWeights, checkpoint: Checkpoint, layout: ModelLayout, replaced: set[str]
) -> tuple[int, int]:
    """(out, in) of a layer that fits the checkpoint; `check_layers` sees to the rest."""
    key = layout.stored.get(f"{layer.name}.weight")
    if key is None:
        raise ModelError(f"{checkpoint.folder} has no layer {layer.name}")
    if key in replaced:
        raise ModelError(f"{layer.name} was given twice")
    out_features, rank = layer.u.shape
    stored = checkpoint.shape(key)
    columns = 0 if layer.columns is None else layer.columns.shape[1]
    if layer.v is not None:
        rank_in, in_features = layer.v.shape[0], layer.v.shape[1] + columns
    elif layer.shared_with is not None:
        rank_in, in_features = rank, sum(stored) - out_features
    else:
        raise ModelError(f"{layer.name} has no in-factor, of its own or of another layer")
    if rank != rank_in or sorted(stored) != sorted((out_features, in_features)):
        raise ModelError(
            f"{layer.name}: factors ({out_features}, {rank}) and ({rank_in}, "
            f"{in_features - columns}) do not make up the weight {stored} of {checkpoint.folder}"
        )
    _check_columns(layer, columns, (out_features, in_features))
    _check_added(layer, (out_features, in_features))
    return out_features, in_features


def _code_tensors(codes: Codes, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    yield "weight", codes.scale.to(dtype)
    yield "codes_out", codes.codes_out
    yield "codes_in", codes.codes_in
    for part, rest in (("rest_out", codes.rest_out), ("rest_in", codes.rest_in)):
        if rest is not None:
            yield part, rest.to(dtype)


def _check_columns(layer: FactoredWeights, columns: int, sizes: tuple[int, int]) -> None:
    if layer.columns is None and layer.column_index is None:
        return
    if layer.columns is None or layer.column_index is None or columns == 0:
        raise ModelError(f"{layer.name}: columns and column_index go together and are not empty")
    shapes = tuple(layer.columns.shape), tuple(layer.column_index.shape)
    if shapes != ((sizes[0], columns), (columns,)):
        raise ModelError(f"{layer.name} {sizes}: columns and index of {shapes} do not fit")
    if not is_column_index(layer.column_index, sizes[1]):
        raise ModelError(f"{layer.name} {sizes}: column_index is no ascending list of inputs")


def _check_added(layer: FactoredWeights, sizes: tuple[int, int]) -> None:
    if layer.sparse is not None:
        mask, count = layer.sparse.mask, layer.sparse.nonzeros
        if tuple(mask.shape) != sizes or count != int(mask.sum()):
            raise ModelError(
                f"{layer.name} {sizes}: {count} values in a mask of {tuple(mask.shape)} with "
                f"{int(mask.sum())} places do not fit"
            )
    if layer.codes is not None and layer.codes.numbers != layer.u.shape[1] * (max(sizes) + 1):
        found = tuple(layer.codes.codes_out.shape)
        raise ModelError(f"{layer.name} {sizes}: codes of {found} do not fit")
    if layer.bias is not None and tuple(layer.bias.shape) != sizes[:1]:
        raise ModelError(f"{layer.name} {sizes}: a bias of {tuple(layer.bias.shape)} does not fit")
