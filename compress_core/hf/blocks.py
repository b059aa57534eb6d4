"""Finds the list of decoder blocks in a model, by what its lists hold and what text passes."""

from collections.abc import Callable
from typing import Any

from torch import nn

from compress_core.errors import ModelError
from compress_core.hf.linear import is_linear

Run = Callable[[], Any]


def find_blocks(model: nn.Module, run: Run) -> tuple[str, ...]:
    """Paths of the decoder blocks: the longest list of modules with linears that text passes.

    Lists within a member of another are parts of a block, like experts. Models of text and images
    have a list for each.

    Args:
        model: The model, of fake tensors.
        run: Runs its base model on a few tokens.

    Raises:
        ModelError: There is no such list, or its blocks hold weights that are no matrices.
    """
    lists = _outermost(model, lambda block: any(map(is_linear, block.modules())))
    if not lists:
        raise ModelError(
            f"{type(model).__name__} has no list of blocks with linear layers, so there is nothing "
            f"to compress block by block{_held_instead(model)}"
        )
    if len(lists) > 1:
        lists = _passed(model, lists, run) or lists
    blocks = max(lists, key=len)
    for path in blocks:
        _refuse_stacked(path, model.get_submodule(path))
    return blocks


def _outermost(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{block}.") for blocks in found for block in blocks)
        if inside or not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        if all(wanted(child) and not is_linear(child) for child in module.children()):
            found.append(tuple(f"{path}.{index}" for index in range(len(module))))
    return found


def _passed(model: nn.Module, lists: list[tuple[str, ...]], run: Run) -> list[tuple[str, ...]]:
    """Those lists a block of which is called."""
    called: set[str] = set()
    handles = [
        model.get_submodule(path).register_forward_pre_hook(lambda *_, p=path: called.add(p))
        for blocks in lists
        for path in blocks
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return [blocks for blocks in lists if called.intersection(blocks)]


def _held_instead(model: nn.Module) -> str:
    """What holds the matrices in the longest list of other modules."""
    lists = _outermost(model, lambda block: any(map(_matrices, block.modules())))
    if not lists:
        return ""
    blocks = max(lists, key=len)
    kinds = {
        type(part).__name__
        for path in blocks
        for part in model.get_submodule(path).modules()
        if _matrices(part)
    }
    container = blocks[0].rpartition(".")[0]
    return f": the matrices of {container} are held by {', '.join(sorted(kinds))}"


def _matrices(module: nn.Module) -> bool:
    return any(parameter.ndim >= 2 for parameter in module.parameters(recurse=False))


def _refuse_stacked(path: str, block: nn.Module) -> None:
    """A parameter of three dimensions is a stack of matrices, unless it is a vector or a filter."""
    for name, module in block.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            vector = parameter.numel() == max(parameter.shape, default=1)
            if parameter.ndim > 2 and not vector and not isinstance(module, nn.Conv1d):
                raise ModelError(
                    f"{'.'.join(filter(None, (path, name, leaf)))} has {parameter.ndim} dimensions "
                    f"{tuple(parameter.shape)}: blocks with weights that are no matrices, fused "
                    "ones for instance, are not compressed yet"
                )
