"""Refuses a folder whose files do not make up the whole model that its config.json describes."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from compress_core.errors import ModelError
from compress_core.hf.binding import Binding, bind
from compress_core.hf.checkpoint import MERGE, Checkpoint

_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_OF_ADAPTERS = ("lora_", ".base_layer.", ".modules_to_save.")
_RENAME = "docs/model-format.md shows how to rename tensors"


def bind_whole(model: Any, checkpoint: Checkpoint) -> Binding:
    """What every parameter and stored buffer of a dense model is loaded from.

    Args:
        model: The model, without weights, in the dtype that it computes in.
        checkpoint: Its files.

    Raises:
        ModelError: Something is missing or of another shape, or is no plain number.
    """
    state: dict[str, Tensor] = model.state_dict()

    def same(one: str, other: str) -> bool:
        dtype = next(iter(state.values())).dtype
        return torch.equal(checkpoint.read(one).to(dtype), checkpoint.read(other).to(dtype))

    binding = bind(model, checkpoint.names, same)
    if binding.missing:
        raise _lacks(model, checkpoint, binding, len(state))
    if binding.converted:
        raise ModelError(
            f"{checkpoint.folder}: {binding.converted[0]}{_others(binding.converted)} is computed "
            "by transformers from an older layout: load the model once and save it with "
            "model.save_pretrained(FOLDER, save_original_format=False)"
        )
    _check_dtypes(checkpoint, state, binding.stored)
    _check_shapes(model, checkpoint, state, binding.stored)
    return binding


def _lacks(model: Any, checkpoint: Checkpoint, binding: Binding, needed: int) -> ModelError:
    missing = binding.missing
    other = sorted(set(checkpoint.names) - set(binding.stored.values()))
    head = model.get_output_embeddings()
    of_head = tuple(n for n in missing if model.get_submodule(n.rpartition(".")[0]) is head)
    if any(mark in key for key in other for mark in _OF_ADAPTERS):
        advice = f"they are of an adapter that is not merged: {MERGE}"
    elif missing == of_head and missing[0].endswith(".weight"):
        advice = (
            f"a model for another use, like {_kind(checkpoint)}, has no language head; give a "
            "checkpoint that has one, or set tie_word_embeddings to true in config.json if this "
            "one's head is its embedding"
        )
    elif len(other) >= len(missing):
        advice = (
            f"they have {len(other)} of other names, first {other[0]}; if those are the same, "
            f"{_RENAME}, else give the config.json that was saved with them"
        )
    else:
        advice = "get the model again, with the config.json that was saved with its weights"
    return ModelError(
        f"{checkpoint.folder}: its files lack {len(missing)} of the {needed} tensors of "
        f"{type(model).__name__}, {', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}, "
        f"which transformers would fill with random numbers: {advice}"
    )


def _kind(checkpoint: Checkpoint) -> str:
    named = checkpoint.config.get("architectures")
    other = [str(name) for name in named if "CausalLM" not in str(name)] if named else []
    return other[0] if other else "a reward model"


def _check_dtypes(
    checkpoint: Checkpoint, state: Mapping[str, Tensor], stored: Mapping[str, str]
) -> None:
    odd = [
        name
        for name in state
        if name in stored
        and state[name].is_floating_point()
        and checkpoint.torch_dtype(stored[name]) not in _PLAIN
    ]
    if odd:
        raise ModelError(
            f"{checkpoint.folder}: {stored[odd[0]]}{_others(odd)} is stored as "
            f"{checkpoint.dtype(stored[odd[0]])} and config.json has no quantization_config that "
            "says what its numbers stand for: start from the unquantised model"
        )


def _check_shapes(
    model: Any, checkpoint: Checkpoint, state: Mapping[str, Tensor], stored: Mapping[str, str]
) -> None:
    other = [
        name
        for name in state
        if name in stored and tuple(state[name].shape) != checkpoint.shape(stored[name])
    ]
    if other:
        key, wanted = stored[other[0]], tuple(state[other[0]].shape)
        found = checkpoint.shape(key)
        advice = "give the config.json that was saved with the weights"
        if model.get_parameter_or_buffer(other[0]) is model.get_input_embeddings().weight:
            advice += f", or set vocab_size to {found[0]}" if found[1:] == wanted[1:] else ""
        raise ModelError(
            f"{checkpoint.folder}: {key}{_others(other)} is {found} in the files and {wanted} by "
            f"config.json: {advice}"
        )


def _others(names: Collection[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
