"""Write a compressed model's folder shard by shard, so that the whole model is never in memory.

The folder holds safetensors, the tokenizer's files as they were, a config.json that names every
compressed layer and its rank, and the modelling code with which plain transformers loads it.
"""

import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import transformers
from torch import Tensor

from compress_core.errors import ModelError
from compress_core.hf.checkpoint import QUANT_METHOD, Checkpoint, tensor_headers, weight_files
from compress_core.hf.factored import FORMAT_VERSION, pays
from compress_core.hf.shards import SHARD_BYTES, ShardWriter, new_folder, write_json

MODELLING_FILE = "modeling_eigenpress.py"

_COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "chat_template*",
    "additional_chat_templates/*",
    "LICENSE*",
    "NOTICE*",
)

# The classes bear the names of the stock ones, and count as such, because transformers chooses by
# name and kind what keys to rename on loading (GPT-NeoX's head), what a pipeline takes, and more.
_FOOTER = '''

import transformers  # noqa: E402


class FactoredModelMixin:
    """What a stock class needs to hold factored layers."""

    _eigenpress_prefix = ""

    def __init__(self, config, *inputs, **kwargs):
        super().__init__(config, *inputs, **kwargs)
        factorise_from_config(self, config, self._eigenpress_prefix)

    @classmethod
    def from_pretrained(cls, *inputs, output_loading_info=False, **kwargs):
        model, found = super().from_pretrained(*inputs, output_loading_info=True, **kwargs)
        require_factors(found["missing_keys"])
        return (model, found) if output_loading_info else model

    @classmethod
    def is_custom_code(cls):
        return False


class {base_class}(FactoredModelMixin, transformers.{base_class}):
    """{base_class} of transformers with factored layers."""

    _eigenpress_prefix = "{name_prefix}"


class {architecture}(FactoredModelMixin, transformers.{architecture}):
    """{architecture} of transformers with factored layers."""
'''


@dataclass(frozen=True)
class FactoredWeights:
    """The two factors of one layer.

    Attributes:
        name: The layer's name in the causal model, like `model.layers.0.self_attn.q_proj`.
        weight_key: The key of the layer's weight in the dense checkpoint.
        u: The out-factor, (out, rank).
        v: The in-factor, (rank, in).
    """

    name: str
    weight_key: str
    u: Tensor
    v: Tensor


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
    *,
    architecture: str,
    base_class: str,
    base_prefix: str,
    max_shard_bytes: int = SHARD_BYTES,
) -> FolderSummary:
    """Write the compressed model: the factors of `layers`, every other tensor as it was.

    Args:
        target: The folder to make; it must not exist, or be empty.
        checkpoint: The dense model.
        layers: The compressed layers, in any order; taken one at a time. With none of them the
            folder is a plain dense model.
        architecture: The causal model's class in transformers, like `LlamaForCausalLM`.
        base_class: Its base model's class, like `LlamaModel`.
        base_prefix: Its `base_model_prefix`, like `model`.
        max_shard_bytes: Upper limit of one weight file, and so of the memory held, in bytes.

    Raises:
        ModelError: A class is not one of transformers' own, a layer does not fit the checkpoint or
            would not be smaller than the dense one, or `target` is in use.
    """
    for name in (architecture, base_class):
        _require_stock(name)
    with new_folder(target) as folder:
        writer = ShardWriter(folder, max_shard_bytes)
        modules: dict[str, dict[str, int]] = {}
        replaced: set[str] = set()
        for layer in layers:
            rank = _checked_rank(layer, checkpoint, base_prefix, replaced)
            dtype = checkpoint.torch_dtype(layer.weight_key)
            writer.add(layer.weight_key, layer.u.to(dtype))
            stem = layer.weight_key.removesuffix(".weight")
            writer.add(f"{stem}.factor_in", layer.v.to(dtype))
            modules[layer.name] = {"rank": rank}
            replaced.add(layer.weight_key)
        for key in checkpoint.names:
            if key not in replaced:
                writer.add(key, checkpoint.read(key))
        files = writer.close()
        copy_companions(checkpoint.folder, folder)
        config = {name: v for name, v in checkpoint.config.items() if name != "auto_map"}
        if modules:
            config["quantization_config"] = {
                "quant_method": QUANT_METHOD,
                "format_version": FORMAT_VERSION,
                "modules": modules,
            }
            config["auto_map"] = auto_map(architecture, base_class)
            source = modelling_source(architecture, base_class, base_prefix)
            (folder / MODELLING_FILE).write_text(source, encoding="utf-8")
        write_json(folder / "config.json", config)
        count = count_parameters(folder)
    return FolderSummary(target, files, len(modules), count.parameters, count.nbytes)


def count_parameters(folder: Path) -> FolderCount:
    """Count what a model folder's safetensors hold, from their headers; tied tensors count once.

    Raises:
        ModelError: The folder has no complete set of weights.
    """
    parameters = nbytes = 0
    for file in weight_files(folder):
        for entry in tensor_headers(file).values():
            parameters += math.prod(entry["shape"])
            start, end = entry["data_offsets"]
            nbytes += end - start
    return FolderCount(parameters, nbytes)


def modelling_source(architecture: str, base_class: str, base_prefix: str) -> str:
    """The text of the modelling file: the factored layer, then the two classes that use it."""
    for name in (architecture, base_class):
        _require_stock(name)
    layer = Path(__file__).with_name("factored.py").read_text(encoding="utf-8")
    return layer + _FOOTER.format(
        architecture=architecture,
        base_class=base_class,
        name_prefix=f"{base_prefix}." if base_prefix else "",
    )


def auto_map(architecture: str, base_class: str) -> dict[str, str]:
    """What config.json tells transformers' auto classes about the modelling file."""
    module = MODELLING_FILE.removesuffix(".py")
    return {
        "AutoModel": f"{module}.{base_class}",
        "AutoModelForCausalLM": f"{module}.{architecture}",
    }


def stock_class(mapping: Mapping[str, str], auto_class: str) -> str:
    """The name of transformers' own class behind an entry of `auto_map`.

    Raises:
        ModelError: It is no such class; whatever else stands there must not reach a Python file.
    """
    name = mapping[auto_class].rpartition(".")[2]
    _require_stock(name)
    return name


def copy_companions(source: Path, target: Path) -> None:
    """Copy the tokenizer, the chat templates, the generation settings and the licence."""
    for file in companion_files(source):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


def companion_files(folder: Path) -> list[Path]:
    """What a compressed folder takes over from the dense one as it is, sorted."""
    found = {file for pattern in _COMPANIONS for file in folder.glob(pattern)}
    return sorted(file for file in found if file.is_file())


def _require_stock(name: str) -> None:
    if not isinstance(getattr(transformers, name, None), type):
        raise ModelError(
            f"transformers {transformers.__version__} has no class {name}: models that bring code "
            "of their own are not supported, and newer ones need a newer transformers"
        )


def _checked_rank(
    layer: FactoredWeights, checkpoint: Checkpoint, base_prefix: str, replaced: set[str]
) -> int:
    key = layer.weight_key
    if key in replaced:
        raise ModelError(f"{layer.name} was given twice")
    if key not in checkpoint.candidates(f"{layer.name}.weight", base_prefix):
        raise ModelError(f"{layer.name}: {key} is not the key of its weight")
    (out_features, rank), (rank_in, in_features) = layer.u.shape, layer.v.shape
    stored = checkpoint.shape(key)
    if rank != rank_in or sorted(stored) != sorted((out_features, in_features)):
        raise ModelError(
            f"{layer.name}: factors {tuple(layer.u.shape)} and {tuple(layer.v.shape)} do not make "
            f"up the weight {stored} of {checkpoint.folder}"
        )
    if not pays(out_features, in_features, rank):
        raise ModelError(
            f"{layer.name} {stored}: factors of rank {rank} would not be smaller than the dense "
            "weight; leave the layer dense"
        )
    return int(rank)
