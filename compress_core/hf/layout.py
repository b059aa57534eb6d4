"""Finds what can be compressed in any decoder that transformers loads, by type and shape alone.

The model is built with fake tensors (no memory, no weights) and run once on a few fake tokens: the
blocks are the longest list of modules that hold linears, and layers that received the very same
tensor share a tap.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from compress_core.errors import ModelError
from compress_core.hf.binding import Binding
from compress_core.hf.blocks import find_blocks
from compress_core.hf.checkpoint import Checkpoint
from compress_core.hf.model_code import first_line
from compress_core.hf.observe import Observed, observe, run_fake
from compress_core.hf.whole import bind_whole
from compress_core.types import LayerRef, ModelLayout

EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
MOST_PARTS = 10_000  # layers, blocks or experts
_COUNTS = re.compile(r"layers$|blocks$|experts$|n_layer$|depth$")


def load_config(checkpoint: Checkpoint, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's configuration.

    Raises:
        ModelError: transformers cannot read it, or would build parts without end.
    """
    _refuse_endless(checkpoint, checkpoint.config)
    try:
        return AutoConfig.from_pretrained(
            checkpoint.folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (ValueError, TypeError, OSError, KeyError, StrictDataclassError) as error:
        file = checkpoint.folder / "config.json"
        raise ModelError(f"transformers cannot read {file}: {_said(error)}") from error


def _refuse_endless(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> None:
    """Looked at before transformers does, which makes a list or a module for every one."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            _refuse_endless(checkpoint, value)
        elif _COUNTS.search(name) and isinstance(value, int) and value > MOST_PARTS:
            raise ModelError(
                f"{checkpoint.folder / 'config.json'}: {name} is {value:,}, and no model has more "
                f"than {MOST_PARTS:,}: get the config.json that was saved with the weights"
            )


def model_dtype(checkpoint: Checkpoint, config: PretrainedConfig) -> torch.dtype:
    """The dtype that ``from_pretrained(dtype="auto")`` would compute in."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    return checkpoint.first_dtype


def inspect_model(
    checkpoint: Checkpoint,
    trust_remote_code: bool = False,
    binding: Callable[[Any, Checkpoint], Binding] = bind_whole,
) -> ModelLayout:
    """Finds blocks, layers and taps without reading a weight.

    Args:
        checkpoint: The model's folder.
        trust_remote_code: Passed to transformers.
        binding: Says of the model, without weights, what each tensor is loaded from.

    Raises:
        ModelError: The model is a mixture of experts, has no list of decoder blocks, or shares one
            linear between blocks, or its files do not hold the whole of it; the message gives the
            reason.
    """
    config = load_config(checkpoint, trust_remote_code)
    dtype = model_dtype(checkpoint, config)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        try:
            model = _build(config, dtype, trust_remote_code)
        except ModelError as error:  # some mixtures cannot even be built of fake tensors
            _refuse_experts(config, error)
            raise
        _require_stock(model)
        if any("expert" in name for name, _ in model.named_parameters()):
            _refuse_experts(config)
        blocks = find_blocks(model, lambda: run_fake(model))
        observed = observe(model, blocks)
    bound = binding(model, checkpoint)
    layers = _layers(model, blocks, observed)
    base = model.base_model
    prefix = model.base_model_prefix if base is not model else ""
    parameters = [name for name, _ in base.named_parameters()]
    buffers = [name for name, _ in base.named_buffers() if name in base.state_dict()]
    inside, outside = _by_block(parameters, blocks, prefix)
    buffers_inside, buffers_outside = _by_block(buffers, blocks, prefix)
    return ModelLayout(
        architecture=type(model).__name__,
        base_class=type(model.base_model).__name__,
        base_prefix=model.base_model_prefix,
        blocks=blocks,
        layers=layers,
        dtype=str(dtype).removeprefix("torch."),
        block_parameters=inside,
        outer_parameters=outside,
        block_buffers=buffers_inside,
        outer_buffers=buffers_outside,
        output_lengths=tuple(observed.output_lengths.get(path, 0) for path in blocks),
        stored=bound.stored,
        unused=tuple(sorted(set(checkpoint.names) - set(bound.stored.values()))),
        wrappers=bound.wrappers,
    )


def _by_block(
    names: Sequence[str], blocks: Sequence[str], prefix: str
) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """Names under each block, and the rest, as the whole model names them."""
    full = [f"{prefix}.{name}" if prefix else name for name in names]
    inside = tuple(tuple(n for n in full if n.startswith(block + ".")) for block in blocks)
    taken = {name for names in inside for name in names}
    return inside, tuple(name for name in full if name not in taken)


def _said(error: Exception) -> str:
    """The first line of what transformers says of a configuration."""
    line = first_line(error)
    return f"no {line}" if isinstance(error, KeyError) else line


def _build(config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """The model without drawing its weights."""
    try:
        with no_init_weights():
            return AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            ).eval()
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError) as error:
        raise ModelError(
            f"transformers builds no causal language model from this {config.model_type} "
            f"config.json: {_said(error)}"
        ) from error


def _refuse_experts(config: PretrainedConfig, cause: Exception | None = None) -> None:
    """Asked where there are some; a configuration may count what its model has not, as Doge's."""
    counted = next(_expert_counts(config.to_dict()), None)
    if counted:
        raise ModelError(
            f"{config.model_type} is a mixture of experts ({counted}): its experts share fused "
            "weights and see different tokens, which Eigenpress does not compress yet"
        ) from cause


def _expert_counts(settings: Mapping[str, Any]) -> Iterator[str]:
    """Looks into nested configurations too: DBRX and models of text and images keep it there."""
    for name, value in settings.items():
        if name in EXPERT_COUNTS and isinstance(value, int) and value > 1:
            yield f"{name}={value}"
        if isinstance(value, Mapping):
            yield from _expert_counts(value)


def _require_stock(model: Any) -> None:
    for part in (model, model.base_model):
        if not type(part).__module__.startswith("transformers."):
            raise ModelError(
                f"{type(part).__name__} is code that comes with the model, not a class of "
                "transformers; such models are not supported, because the compressed folder could "
                "not be loaded without that code"
            )


def _layers(model: Any, blocks: tuple[str, ...], observed: Observed) -> tuple[LayerRef, ...]:
    layers: dict[str, LayerRef] = {}
    for _, readers in observed.inputs.values():
        for name in readers:
            if name in layers:  # called more than once: its first input names the tap
                continue
            module = model.get_submodule(name)
            transposed = isinstance(module, Conv1D)
            rows, columns = module.weight.shape
            out_features, in_features = (columns, rows) if transposed else (rows, columns)
            block = next(i for i, path in enumerate(blocks) if name.startswith(path + "."))
            layers[name] = LayerRef(name, block, out_features, in_features, readers[0], transposed)
    return tuple(sorted(layers.values(), key=lambda layer: layer.block))
