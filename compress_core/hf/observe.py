"""Runs a model of fake tensors once and notes who reads what, and what blocks hand on."""

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compress_core.errors import ModelError
from compress_core.head import Halves
from compress_core.hf.linear import is_linear
from compress_core.hf.model_code import model_code


@dataclass
class Observed:
    """What a forward of fake tokens showed.

    Attributes:
        inputs: Tensor, by its id and kept alive, and the linears that read it, in order.
        output_lengths: For each block that was called, how many values its tuple has; 0 for a
            tensor by itself.
        left: Names of what blocks left for later ones in a mapping.
        returned: What blocks returned beside hidden states, kept alive.
    """

    inputs: dict[int, tuple[Tensor, list[str]]] = field(default_factory=dict)
    output_lengths: dict[str, int] = field(default_factory=dict)
    left: set[Any] = field(default_factory=set)
    returned: list[Tensor] = field(default_factory=list)


def run_fake(model: Any) -> Any:
    """What the base model returns for a few fake tokens.

    Raises:
        ModelError: It raises something, be it for a step that needs real numbers.
    """
    with model_code(f"{type(model).__name__} cannot be followed without its weights"):
        return model.base_model(input_ids=torch.zeros(1, 8, dtype=torch.long), use_cache=False)


def observe(model: Any, blocks: tuple[str, ...]) -> Observed:
    """Runs a few fake tokens and notes which linears read the same tensor.

    Raises:
        ModelError: Blocks share a linear or hand on more than hidden states, no linear was
            reached, the model cannot be run, or its head not apart from it.
    """
    observed = Observed()
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
        _watch_block(path, model.get_submodule(path), type(model).__name__, observed)
    try:
        output = run_fake(model)
    except ModelError as error:  # a later block looked for what was taken away
        sought = error.__cause__.args[:1] if isinstance(error.__cause__, KeyError) else ()
        if observed.left.intersection(sought):
            raise _hands_on_more(type(model).__name__) from error.__cause__
        raise
    if not observed.inputs:
        raise ModelError(
            f"text passes through no linear layer of {blocks[0]} and its {len(blocks) - 1} "
            f"likes, the longest list of blocks in {type(model).__name__}"
        )
    _check_head(model, output)
    return observed


def _check_head(model: Any, output: Any) -> None:
    """Refuses a head that cannot be run apart, which would else be told after all the work."""
    halves = Halves(model)
    with model_code(f"{type(model).__name__} cannot be evaluated piece by piece"):
        halves.logits(halves.last(output)[0])


def _watch_block(path: str, block: nn.Module, architecture: str, observed: Observed) -> None:
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
        others = {id(tensor) for tensor in observed.returned}
        if any(id(tensor) in others for tensor in tensors_in(call)):
            raise _hands_on_more(architecture)

    def after(_: nn.Module, *call: Any) -> None:
        *arguments, output = call
        several = isinstance(output, tuple | list)
        observed.output_lengths[path] = len(output) if several else 0
        if several:
            observed.returned += tensors_in(output[1:])
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
