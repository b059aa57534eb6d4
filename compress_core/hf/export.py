"""Turn a compressed folder back into an ordinary checkpoint of the original architecture.

The factors are multiplied layer by layer while the files stream through; what comes out loads
anywhere and is as large as the dense model was.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from compress_core.errors import ModelError
from compress_core.hf.binding import bind
from compress_core.hf.checkpoint import Checkpoint
from compress_core.hf.companions import copy_companions
from compress_core.hf.factored import is_column_index, is_factored, product
from compress_core.hf.factorise import factorise
from compress_core.hf.modelling import stock_class
from compress_core.hf.quantised_linear import QuantisedLinear, quantised_product
from compress_core.hf.shards import SHARD_BYTES, ShardWriter, new_folder, write_json
from compress_core.hf.sparse_linear import SparseLinear
from compress_core.quantise import CODES, Codes
from compress_core.sparse import Sparse, unpack

OURS = ("quantization_config", "auto_map")


def to_dense(folder: Path, target: Path, max_shard_bytes: int = SHARD_BYTES) -> None:
    """Write the dense model that a compressed one is equal to, up to one rounding per weight.

    Args:
        folder: A compressed model's folder.
        target: The folder to make; it must not exist, or be empty.
        max_shard_bytes: Upper limit of one weight file, and so of the memory held, in bytes.

    Raises:
        ModelError: `folder` is not a compressed model, is damaged or of a newer format, a layer
            has a bias that the architecture has no place for, or `target` is in use.
    """
    checkpoint = Checkpoint(folder, compressed=True)
    layers = stored_layers(checkpoint)
    architecture = stock_class(checkpoint.config["auto_map"], "AutoModelForCausalLM")
    for layer in layers.values():
        if layer.new_bias:
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
                writer.add(key, dense_weight(checkpoint, key, layers[key]))
            elif key not in parts:
                writer.add(key, checkpoint.read(key))
        writer.close()
        copy_companions(checkpoint.folder, draft)
        config = {name: v for name, v in checkpoint.config.items() if name not in OURS}
        write_json(draft / "config.json", config)


@dataclass(frozen=True)
class StoredLayer:
    """Where a layer's tensors lie beside its out-factor.

    `name` is the layer's in the model, `bias` has the key of its bias, or none, `new_bias` is
    whether the dense layer had none. `factor_in` has the in-factor's key, `columns` those of
    columns and column_index, `sparse` those of the values and of their places, or none; `codes`, of
    a layer in 8 bits, part and key of all but the scale; `transposed` is whether the dense weight
    was (in, out).
    """

    name: str
    new_bias: bool
    bias: tuple[str, ...]
    factor_in: tuple[str, ...]
    columns: tuple[str, ...]
    sparse: tuple[str, ...]
    codes: tuple[tuple[str, str], ...]
    transposed: bool

    @property
    def others(self) -> tuple[str, ...]:
        """All keys but those of the out-factor and the bias."""
        return (*self.factor_in, *self.columns, *self.sparse, *(key for _, key in self.codes))


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
        factorise(model, modules, format_version=version)
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
        if is_factored(module):
            name = module.layer_name
            kept = ("columns", "column_index") if module.column_count else ()
            sparse = ("sparse_values", *module.places()) if isinstance(module, SparseLinear) else ()
            coded = _parts_in_8_bits(module)
            owner = () if coded else (module.shared_with or name,)
            layers[key(name, "weight")] = StoredLayer(
                name,
                module.new_bias,
                () if module.bias is None else (key(name, "bias"),),
                tuple(key(layer, "factor_in") for layer in owner),
                tuple(key(name, part) for part in kept),
                tuple(key(name, part) for part in sparse),
                tuple((part, key(name, part)) for part in coded),
                module.transposed,
            )
    return layers


def empty_model(folder: Path, architecture: str) -> transformers.PreTrainedModel:
    """The dense model without weights: it alone knows which layers keep theirs as (in, out)."""
    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    with torch.device("meta"):
        model: transformers.PreTrainedModel = getattr(transformers, architecture)(config)
    return model


def _parts_in_8_bits(module: Any) -> tuple[str, ...]:
    """What a layer has in 8 bits, and what is left of its factors; nothing for other layers."""
    if not isinstance(module, QuantisedLinear):
        return ()
    rests = (part for part in ("rest_out", "rest_in") if getattr(module, part) is not None)
    return (*CODES, *rests)


def dense_weight(checkpoint: Checkpoint, key: str, layer: StoredLayer) -> Tensor:
    """What a layer stands for, as the dense checkpoint kept it.

    Args:
        checkpoint: The compressed folder.
        key: Key of the layer's out-factor.
        layer: What else it has.

    Returns:
        (out, in), or (in, out) where `transposed`.

    Raises:
        ModelError: What is stored names inputs or places that are not there.
    """
    if layer.codes:
        parts = {part: checkpoint.read(where) for part, where in layer.codes}
        weight = quantised_product(Codes(checkpoint.read(key), **parts))
        return weight.T if layer.transposed else weight
    u, v = checkpoint.read(key), checkpoint.read(*layer.factor_in)
    columns = index = None
    if layer.columns:
        columns, index = (checkpoint.read(part) for part in layer.columns)
        if not is_column_index(index, v.shape[1] + columns.shape[1]):
            raise ModelError(f"{checkpoint.folder}: {layer.columns[1]} is damaged: get it again")
    sparse = _sparse_part(checkpoint, layer, (u.shape[0], v.shape[1])) if layer.sparse else None
    weight = product(u, v, columns, index, sparse)
    return weight.T if layer.transposed else weight


def _sparse_part(checkpoint: Checkpoint, layer: StoredLayer, sizes: tuple[int, int]) -> Tensor:
    values, *places = (checkpoint.read(key) for key in layer.sparse)
    names = [key.rpartition(".")[2] for key in layer.sparse[1:]]
    try:
        mask = unpack(dict(zip(names, places, strict=True)), *sizes, values.numel())
    except ValueError as error:
        raise ModelError(
            f"{checkpoint.folder}: {layer.sparse[1]}: {error}: it is damaged, get it again"
        ) from error
    return Sparse(mask, values).dense()
