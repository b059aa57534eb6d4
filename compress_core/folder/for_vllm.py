"""Write a compressed model as vLLM's Transformers backend takes it: pairs of plain linear layers.

The rules are vLLM's: customisation in the base model that `auto_map.AutoModel` names, no
`quantization_config`, attention that is chosen by name, a tensor-parallel plan.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from compress_core.errors import ModelError
from compress_core.folder.export import (
    OURS,
    StoredLayer,
    dense_weight,
    empty_model,
    read_parts,
    stored_layers,
)
from compress_core.folder.modelling import stock_class, stock_module
from compress_core.folder.shards import SHARD_BYTES, ShardWriter, new_folder, write_json
from compress_core.forms.kinds import kinds_of, pair_of, pays
from compress_core.forms.part import Tensors
from compress_core.hf.checkpoint import Checkpoint
from compress_core.hf.companions import copy_companions

CODE = "modeling_eigenpress_vllm"
ARCHITECTURE = "TransformersForCausalLM"  # vLLM's name for whatever its Transformers backend runs

_FOOTER = '''

import transformers  # noqa: E402
import {base_module}  # noqa: E402
import {config_module}  # noqa: E402


class {config_class}({config_module}.{config_class}):
    """{config_class} under a model type that stock classes do not take for theirs."""

    model_type = "eigenpress_{model_type}"


class PairedModelMixin:
    """What a stock class needs to hold pairs of linear layers."""

    config_class = {config_class}
    _eigenpress_prefix = ""

    def __init__(self, config, *inputs, **kwargs):
        super().__init__(config, *inputs, **kwargs)
        pair_linears(self, config.eigenpress_layers, self._eigenpress_prefix)
        self._tp_plan = pair_plan(self._tp_plan or {{}}, self.named_modules())

    @classmethod
    def from_pretrained(cls, *inputs, output_loading_info=False, **kwargs):
        model, found = super().from_pretrained(*inputs, output_loading_info=True, **kwargs)
        require_pairs(model, found["missing_keys"])
        return (model, found) if output_loading_info else model

    @classmethod
    def is_custom_code(cls):
        return False


class {base_class}(PairedModelMixin, {base_module}.{base_class}):
    """{base_class} of transformers with pairs of linear layers."""

    _eigenpress_prefix = "{name_prefix}"


class {architecture}(PairedModelMixin, transformers.{architecture}):
    """{architecture} of transformers with pairs of linear layers."""
'''


def to_vllm(folder: Path, target: Path, max_shard_bytes: int = SHARD_BYTES) -> None:
    """Write the model as plain linear layers in containers, to the rules of vLLM.

    Shared in-factors are written with every layer, kept columns as components that pick one input
    each, the pivot form as plain factors. A layer that would not be smaller than its dense weight
    so is written dense.

    Args:
        folder: A compressed model's folder.
        target: The folder to make; it must not exist, or be empty.
        max_shard_bytes: Upper limit of one weight file, and so of the memory held, in bytes.

    Raises:
        ModelError: `folder` is not a compressed model, is damaged or of a newer format, holds
            sparse entries, a base, 8-bit factors or numbers in codes, the architecture's attention
            is its own, or `target` is in use.
    """
    checkpoint = Checkpoint(folder, compressed=True)
    layers = stored_layers(checkpoint)
    model = empty_model(checkpoint.folder, _architecture(checkpoint))
    _require_plain(checkpoint, layers, model)
    biases = {key for layer in layers.values() for key in layer.bias}
    parts = biases.union(*(layer.others for layer in layers.values()))
    pairs: dict[str, Any] = {}
    with new_folder(target) as draft:
        writer = ShardWriter(draft, max_shard_bytes)
        for key in checkpoint.names:
            if key in layers:
                for name, tensor in _tensors(checkpoint, key, layers[key], pairs):
                    writer.add(name, tensor)
            elif key not in parts:
                writer.add(key, checkpoint.read(key))
        writer.close()
        copy_companions(checkpoint.folder, draft)
        _describe(checkpoint, model, pairs, draft)


def _architecture(checkpoint: Checkpoint) -> str:
    return stock_class(checkpoint.config["auto_map"], "AutoModelForCausalLM")


def _require_plain(checkpoint: Checkpoint, layers: dict[str, StoredLayer], model: Any) -> None:
    if not model._supports_attention_backend:
        raise ModelError(
            f"{checkpoint.folder}: vLLM's Transformers backend does not run "
            f"{type(model).__name__}, whose attention is its own; use --to dense"
        )
    for layer in layers.values():
        odd = [kind.words for kind in kinds_of(layer.entry) if not kind.paired]
        odd += ["numbers in codes"] if "codes" in layer.entry else []
        if odd:
            what = " and ".join(odd)
            raise ModelError(
                f"{checkpoint.folder}: {layer.name} has {what}, which plain linear layers cannot "
                "hold; use --to dense"
            )


def _tensors(
    checkpoint: Checkpoint, key: str, layer: StoredLayer, pairs: dict[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """Key and tensor of all that a layer becomes; where it is a pair, `pairs` gets its sizes."""
    stem = key.removesuffix("weight")
    out_factor, in_factor = _factors(read_parts(checkpoint, layer), layer)
    (rows, rank), inputs = out_factor.shape, in_factor.shape[1]
    # The dense layer has no place for a bias that only the compressed one got.
    paired = pays(rows, inputs, {"rank": rank}) or bool(layer.entry.get("bias"))
    if paired:
        sizes = {"in_features": inputs, "out_features": rows, "rank": rank}
        pairs[layer.name] = {**sizes, "bias": bool(layer.bias)}
        yield f"{stem}in_factor.weight", in_factor.clone()  # a shared one is stored twice
        yield f"{stem}out_factor.weight", out_factor
    else:
        yield key, dense_weight(checkpoint, layer)
    for bias in layer.bias:
        yield f"{stem}out_factor.bias" if paired else bias, checkpoint.read(bias)


def _factors(tensors: Tensors, layer: StoredLayer) -> tuple[Tensor, Tensor]:
    """(out, rank) and (rank, in), never of rank 0."""
    u, v = pair_of(layer.entry, tensors, layer.sizes)
    # a component of zeros, for engines have no linear layer without outputs
    return (u, v) if len(v) else (u.new_zeros(len(u), 1), v.new_zeros(1, v.shape[1]))


def _describe(checkpoint: Checkpoint, model: Any, pairs: dict[str, Any], folder: Path) -> None:
    """Write configuration and code."""
    config = {name: v for name, v in checkpoint.config.items() if name not in OURS}
    architecture, kind = _architecture(checkpoint), type(model.config)
    base_class = stock_class(checkpoint.config["auto_map"], "AutoModel")
    classes = {"AutoConfig": kind.__name__, "AutoModel": base_class}
    classes["AutoModelForCausalLM"] = architecture
    config |= {
        "architectures": [ARCHITECTURE],
        "auto_map": {auto: f"{CODE}.{name}" for auto, name in classes.items()},
        "eigenpress_layers": pairs,
        "model_type": f"eigenpress_{kind.model_type}",
    }
    write_json(folder / "config.json", config)
    prefix = model.base_model_prefix
    code = Path(__file__).with_name("containers.py").read_text(encoding="utf-8")
    code += _FOOTER.format(
        architecture=architecture,
        base_class=base_class,
        base_module=stock_module(base_class, architecture),
        config_class=kind.__name__,
        config_module=kind.__module__,
        model_type=kind.model_type,
        name_prefix=f"{prefix}." if hasattr(model, prefix) else "",
    )
    (folder / f"{CODE}.py").write_text(code, encoding="utf-8")
