"""Finds what can be compressed in any decoder that transformers loads, by type and shape alone.

The model is built with fake tensors (no memory, no weights) and run once on a few fake tokens: the
blocks are the longest list of modules that hold linears, and layers that received the very same
tensor share a tap.
"""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from compress_core.errors import ModelError
from compress_core.hf.checkpoint import Checkpoint
from compress_core.hf.whole import bind_whole
from compress_core.types import LayerRef, ModelLayout

EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def load_config(checkpoint: Checkpoint, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's configuration.

    Raises:
        ModelError: transformers cannot read it.
    """
    try:
        return AutoConfig.from_pretrained(
            checkpoint.folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (ValueError, TypeError, OSError, KeyError, StrictDataclassError) as error:
        file = checkpoint.folder / "config.json"
        raise ModelError(f"transformers cannot read {file}: {_reason(error)}") from error


def model_dtype(checkpoint: Checkpoint, config: PretrainedConfig) -> torch.dtype:
    """The dtype that ``from_pretrained(dtype="auto")`` would compute in."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    return checkpoint.first_dtype


def inspect_model(checkpoint: Checkpoint, trust_remote_code: bool = False) -> ModelLayout:
    """Finds blocks, layers and taps without reading a weight.

    Raises:
        ModelError: The model is a mixture of experts, has no list of decoder blocks, or shares one
            linear between blocks, or its files do not hold the whole of it; the message gives the
            reason.
    """
    config = load_config(checkpoint, trust_remote_code)
    _refuse_experts(config.model_type, config.to_dict())
    dtype = model_dtype(checkpoint, config)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = _build(config, dtype, trust_remote_code)
        _require_stock(model)
        blocks = _find_blocks(model)
        observed = _observe(model, blocks)
    binding = bind_whole(model, checkpoint)
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
        tuple_output=observed.tuple_output,
        stored=binding.stored,
        unused=tuple(sorted(set(checkpoint.names) - set(binding.stored.values()))),
        wrappers=binding.wrappers,
    )


def _by_block(
    names: Sequence[str], blocks: Sequence[str], prefix: str
) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """Names under each block, and the rest, as the whole model names them."""
    full = [f"{prefix}.{name}" if prefix else name for name in names]
    inside = tuple(tuple(n for n in full if n.startswith(block + ".")) for block in blocks)
    taken = {name for names in inside for name in names}
    return inside, tuple(name for name in full if name not in taken)


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a plain linear layer that we know how to replace."""
    return type(module) is nn.Linear or type(module) is Conv1D


def _reason(error: Exception) -> str:
    """The first line of what transformers says; a strict configuration's own line is its cause."""
    said = error.__cause__ if isinstance(error, StrictDataclassError) else error
    line = (str(said).strip() or type(said).__name__).splitlines()[0]
    return f"no {line}" if isinstance(said, KeyError) else line


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
            f"config.json: {_reason(error)}"
        ) from error


def _refuse_experts(model_type: str, settings: Mapping[str, Any]) -> None:
    """Looks into nested configurations too: DBRX and models of text and images keep it there."""
    for name, value in settings.items():
        if name in EXPERT_COUNTS and isinstance(value, int) and value > 1:
            raise ModelError(
                f"{model_type} is a mixture of experts ({name}={value}): its experts share fused "
                "weights and see different tokens, which Eigenpress does not compress yet"
            )
        if isinstance(value, Mapping):
            _refuse_experts(model_type, value)


def _require_stock(model: Any) -> None:
    for part in (model, model.base_model):
        if not type(part).__module__.startswith("transformers."):
            raise ModelError(
                f"{type(part).__name__} is code that comes with the model, not a class of "
                "transformers; such models are not supported, because the compressed folder could "
                "not be loaded without that code"
            )


def _find_blocks(model: nn.Module) -> tuple[str, ...]:
    """Paths of the decoder blocks: the longest ModuleList whose members all hold linears."""
    found: list[tuple[str, ...]] = []
    for path, module in model.named_modules():
        listed = isinstance(module, nn.ModuleList) and len(module) > 0
        if listed and all(_holds_linears(child) for child in module.children()):
            found.append(tuple(f"{path}.{i}" for i in range(len(module))))
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no list of blocks with linear layers, so there is nothing "
            "to compress block by block"
        )
    blocks = max(found, key=len)
    for path in blocks:
        for name, module in model.get_submodule(path).named_modules():
            for leaf, parameter in module.named_parameters(recurse=False):
                if parameter.ndim > 2 and not isinstance(module, nn.Conv1d):
                    raise ModelError(
                        f"{path}.{name}.{leaf} has {parameter.ndim} dimensions "
                        f"{tuple(parameter.shape)}: fused weights are not compressed yet"
                    )
    return blocks


def _holds_linears(module: nn.Module) -> bool:
    return not is_linear(module) and any(is_linear(part) for part in module.modules())


@dataclass
class _Observed:
    """What a forward of fake tokens showed."""

    inputs: dict[int, tuple[Tensor, list[str]]]  # id -> (the tensor, kept alive, and its readers)
    tuple_output: bool = False
    left: set[Any] = field(default_factory=set)  # names of what blocks left for later ones


def _observe(model: Any, blocks: tuple[str, ...]) -> _Observed:
    """Runs a few fake tokens and notes which linears read the same tensor."""
    observed = _Observed({})
    inner = {
        f"{path}.{name}": module
        for path in blocks
        for name, module in model.get_submodule(path).named_modules()
        if is_linear(module)
    }
    if len({id(module) for module in inner.values()}) < len(inner):
        raise ModelError("two blocks share one linear layer; compressing it twice would be wrong")

    def note_input(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            observed.inputs.setdefault(id(args[0]), (args[0], []))[1].append(name)

        return hook

    for name, module in inner.items():
        module.register_forward_pre_hook(note_input(name))
    for path in blocks:
        _watch_block(model.get_submodule(path), type(model).__name__, observed)
    try:
        model.base_model(input_ids=torch.zeros(1, 8, dtype=torch.long), use_cache=False)
    except RuntimeError as error:  # shapes that do not fit, or a step that needs real numbers
        raise ModelError(
            f"{type(model).__name__} cannot be followed without its weights: {_reason(error)}"
        ) from error
    except KeyError as error:  # a later block looked for what was taken away
        if error.args[:1] and error.args[0] in observed.left:
            raise _hands_on_more(type(model).__name__) from error
        raise
    if not observed.inputs:
        raise ModelError(
            f"text passes through no linear layer of {blocks[0]} and its {len(blocks) - 1} "
            f"likes, the longest list of blocks in {type(model).__name__}"
        )
    return observed


def _watch_block(block: nn.Module, architecture: str, observed: _Observed) -> None:
    """Notes what kind of output a block has, and refuses one that hands on more than that.

    What a block leaves in a mapping that it was given is taken away again: Gemma 4 always leaves
    keys and values there, but only some sizes have later blocks that look for them.
    """
    given: list[tuple[MutableMapping[Any, Any], dict[Any, Any]]] = []
    count = 0

    def before(_: nn.Module, *call: Any) -> None:
        nonlocal count
        given[:] = [(mapping, dict(mapping)) for mapping in _mappings_in(call)]
        count = sum(1 for _ in tensors_in(call))

    def after(_: nn.Module, *call: Any) -> None:
        *arguments, output = call
        observed.tuple_output = isinstance(output, tuple | list)
        for mapping, held in given:
            for name in mapping.keys() - held.keys():
                del mapping[name]
                observed.left.add(name)
        if sum(1 for _ in tensors_in(arguments)) != count:
            raise _hands_on_more(architecture)

    block.register_forward_pre_hook(before, with_kwargs=True)
    block.register_forward_hook(after, with_kwargs=True)


def _hands_on_more(architecture: str) -> ModelError:
    return ModelError(
        f"the blocks of {architecture} leave tensors for later blocks beside their hidden states, "
        "so it cannot be run block by block"
    )


def _mappings_in(value: Any) -> Iterator[MutableMapping[Any, Any]]:
    """Every mapping in nested lists and tuples that can be added to, those in mappings too."""
    parts = list(value.values()) if isinstance(value, Mapping) else value
    if isinstance(value, MutableMapping):
        yield value
    if isinstance(parts, list | tuple):
        for part in parts:
            yield from _mappings_in(part)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested mappings, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)


def _layers(model: Any, blocks: tuple[str, ...], observed: _Observed) -> tuple[LayerRef, ...]:
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
