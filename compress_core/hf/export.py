"""Turn a compressed folder back into an ordinary checkpoint of the original architecture.

The factors are multiplied layer by layer while the files stream through; what comes out loads
anywhere and is as large as the dense model was.
"""

from pathlib import Path

import torch
import transformers
from torch import Tensor

from compress_core.errors import ModelError
from compress_core.hf.checkpoint import Checkpoint
from compress_core.hf.factored import check_version, product
from compress_core.hf.folder import copy_companions, stock_class
from compress_core.hf.shards import SHARD_BYTES, ShardWriter, new_folder, write_json

_OURS = ("quantization_config", "auto_map")


def to_dense(folder: Path, target: Path, max_shard_bytes: int = SHARD_BYTES) -> None:
    """Write the dense model that a compressed one is equal to, up to one rounding per weight.

    Args:
        folder: A compressed model's folder.
        target: The folder to make; it must not exist, or be empty.
        max_shard_bytes: Upper limit of one weight file, and so of the memory held, in bytes.

    Raises:
        ModelError: `folder` is not a compressed model, is damaged or of a newer format, or
            `target` is in use.
    """
    checkpoint = Checkpoint(folder, compressed=True)
    factor_of = _factor_keys(checkpoint)
    in_factors = {factor for factor, _ in factor_of.values()}
    with new_folder(target) as draft:
        writer = ShardWriter(draft, max_shard_bytes)
        for key in checkpoint.names:
            if key in factor_of:
                factor, transposed = factor_of[key]
                writer.add(key, _dense_weight(checkpoint, key, factor, transposed))
            elif key not in in_factors:
                writer.add(key, checkpoint.read(key))
        writer.close()
        copy_companions(checkpoint.folder, draft)
        config = {name: v for name, v in checkpoint.config.items() if name not in _OURS}
        write_json(draft / "config.json", config)


def _factor_keys(checkpoint: Checkpoint) -> dict[str, tuple[str, bool]]:
    """Key of an out-factor -> key of its in-factor, and whether the dense weight was (in, out)."""
    settings = checkpoint.config["quantization_config"]
    try:
        check_version(settings["format_version"])
        architecture = stock_class(checkpoint.config["auto_map"], "AutoModelForCausalLM")
        modules = list(settings["modules"])
    except KeyError as error:
        raise ModelError(f"{checkpoint.folder}/config.json lacks {error}: get it again") from error
    except ValueError as error:
        raise ModelError(f"{checkpoint.folder}: {error}") from error
    model = _empty_model(checkpoint.folder, architecture)
    keys = {}
    for name in modules:
        weight = checkpoint.key(f"{name}.weight", model.base_model_prefix)
        factor = checkpoint.key(f"{name}.factor_in", model.base_model_prefix)
        keys[weight] = (factor, type(model.get_submodule(name)).__name__ == "Conv1D")
    return keys


def _empty_model(folder: Path, architecture: str) -> transformers.PreTrainedModel:
    """The dense model without weights: it alone knows which layers keep theirs as (in, out)."""
    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    with torch.device("meta"):
        model: transformers.PreTrainedModel = getattr(transformers, architecture)(config)
    return model


def _dense_weight(checkpoint: Checkpoint, key: str, factor: str, transposed: bool) -> Tensor:
    weight = product(checkpoint.read(key), checkpoint.read(factor))
    return weight.T if transposed else weight
