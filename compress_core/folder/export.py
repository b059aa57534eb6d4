"""Turn a compressed folder back into an ordinary checkpoint of the original architecture.

The factors are multiplied layer by layer while the files stream through; what comes out loads
anywhere and is as large as the dense model was.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor

from compress_core.errors import ModelError
from compress_core.folder.modelling import stock_class
from compress_core.folder.shards import SHARD_BYTES, ShardWriter, new_folder, write_json
from compress_core.folder.swap import swap_layers
from compress_core.forms.kinds import check_parts, dense_of
from compress_core.forms.linear import CompressedLinear
from compress_core.forms.part import Entry, Sizes
from compress_core.hf.binding import bind
from compress_core.hf.checkpoint import Checkpoint
from compress_core.hf.companions import copy_companions

OURS = ("quantization_config", "auto_map")


def to_dense(folder: Path, target: Path, max_shard_bytes: int = SHARD_BYTES) -> None:
    """Write the dense model that a compressed one is equal to, up to one rounding per weight.

    Args:
        folder: A compressed model's folder.
        target: The folder to make; it must not exist, or be empty.
        max_shard_bytes: Upper limit of one weight file, in bytes.

    Raises:
        ModelError: `folder` is not a compressed model, is damaged or of a newer format, a layer
            has a bias that the architecture has no place for, or `target` is in use.
    """
    checkpoint = Checkpoint(folder, compressed=True)
    layers = stored_layers(checkpoint)
    architecture = stock_class(checkpoint.config["auto_map"], "AutoModelForCausalLM")
    for layer in layers.values():
        if layer.entry.get("bias"):
            raise ModelError(
                f"{checkpoint.folder}: {layer.name} got a bias from its method, which "
                f"{architecture} has no place for, so there is no ordinary checkpoint of this "
                "model: load the folder itself; with `import compress_core.hf` before, "
                "model.dequantize() works"
            )
    parts = {key for layer in layers.values() for key in layer.others}
    with new_folder(target) as draft:
        writer = ShardWriter(draft, max_shard_bytes)
        for key in checkpoint.names:
            if key in layers:
                writer.add(key, dense_weight(checkpoint, layers[key]))
            elif key not in parts:
                writer.add(key, checkpoint.read(key))
        writer.close()
        copy_companions(checkpoint.folder, draft)
        config = {name: v for name, v in checkpoint.config.items() if name not in OURS}
        write_json(draft / "config.json", config)


@dataclass(frozen=True)
class StoredLayer:
    """Where a layer's tensors lie.

    Attributes:
        name: The layer's, in the model.
        entry: What config.json says of it.
        sizes: Its own.
        keys: Part to key, of all that it computes with but the bias.
        bias: Key of its bias, or none.
        transposed: Whether the dense weight was (in, out).
    """

    name: str
    entry: Entry
    sizes: Sizes
    keys: Mapping[str, str]
    bias: tuple[str, ...]
    transposed: bool

    @property
    def others(self) -> tuple[str, ...]:
        """All keys but those of `weight` and the bias."""
        return tuple(key for part, key in self.keys.items() if part != "weight")


def stored_layers(checkpoint: Checkpoint) -> dict[str, StoredLayer]:
    """Key of an out-factor -> what belongs to it.

    Raises:
        ModelError: The folder is damaged or of a newer format.
    """
    settings = checkpoint.config["quantization_config"]
    try:
        architecture = stock_class(checkpoint.config["auto_map"], "AutoModelForCausalLM")
        modules, version = settings["modules"], settings["format_version"]
        model = empty_model(checkpoint.folder, architecture)
        swap_layers(model, modules, format_version=version)
    except KeyError as error:
        raise ModelError(f"{checkpoint.folder}/config.json lacks {error}: get it again") from error
    except ValueError as error:
        raise ModelError(f"{checkpoint.folder}: {error}") from error

    stored = bind(model, checkpoint.names).stored

    def key(name: str, part: str) -> str:
        if f"{name}.{part}" not in stored:
            raise ModelError(
                f"{checkpoint.folder} has no tensor '{name}.{part}': it is incomplete, get it again"
            )
        return stored[f"{name}.{part}"]

    layers = {}
    for module in model.modules():
        if isinstance(module, CompressedLinear):
            name = module.layer_name
            owner = {part: name for part in module.parts}
            owner |= {part: str(module.shared_with) for part in module.shared_parts}
            keys = {part: key(layer, part) for part, layer in owner.items()}
            bias = () if module.bias is None else (key(name, "bias"),)
            layers[keys["weight"]] = StoredLayer(
                name, module.entry, module.sizes, keys, bias, module.transposed
            )
    return layers


def empty_model(folder: Path, architecture: str) -> transformers.PreTrainedModel:
    """The dense model without weights: it alone knows which layers keep theirs as (in, out)."""
    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    with torch.device("meta"):
        model: transformers.PreTrainedModel = getattr(transformers, architecture)(config)
    return model


def read_parts(checkpoint: Checkpoint, layer: StoredLayer) -> dict[str, Tensor]:
    """What a layer computes with but the bias, by part.

    Raises:
        ModelError: It contradicts itself.
    """
    tensors = {part: checkpoint.read(key) for part, key in layer.keys.items()}
    try:
        check_parts(layer.entry, tensors, layer.sizes)
    except ValueError as error:
        raise ModelError(
            f"{checkpoint.folder}: {layer.name}.{error}: it is damaged, get it again"
        ) from error
    return tensors


def dense_weight(checkpoint: Checkpoint, layer: StoredLayer) -> Tensor:
    """What a layer stands for, as the dense checkpoint kept it.

    Returns:
        (out, in), or (in, out) where `transposed`.

    Raises:
        ModelError: What is stored names inputs or places that are not there.
    """
    weight = dense_of(layer.entry, read_parts(checkpoint, layer), layer.sizes)
    return weight.T if layer.transposed else weight
