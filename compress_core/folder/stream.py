"""A compressed folder, block by block: beside the dense model that it was made of, or by itself.

What is outside the blocks is the same in both, and so is what a block is called with beside its
hidden states; the block itself is loaded from either folder.
"""

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress_core.errors import ModelError
from compress_core.folder.swap import SHARED, check_layers, check_version, plain_entries
from compress_core.forms.kinds import SLOTS
from compress_core.forms.linear import CompressedLinear, is_compressed
from compress_core.hf.binding import Binding, bind, unwrapped
from compress_core.hf.checkpoint import Checkpoint
from compress_core.hf.inside import read_json
from compress_core.hf.layout import inspect_model
from compress_core.hf.states import Room
from compress_core.hf.stream import BlockStream, drop_parameters
from compress_core.types import LayerRef, ModelLayout


class FolderStream(BlockStream):
    """The dense model, block by block, whose blocks can be those of a compressed folder.

    Args:
        checkpoint: The dense model.
        layout: Its layout.
        folder: What was made of it; it may have no compressed layers.
        device: Where blocks run.
        trust_remote_code: Passed to transformers.
        dtype: In which blocks run and hidden states are kept; None is the model's own.
        room: Where hidden states are kept.

    Attributes:
        compressed: The tensors of the folder.
        entries: Compressed layer to what config.json says of it.
        tied: Keys of tensors that more than one block, or another part of the model, has.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layout: ModelLayout,
        folder: Path,
        device: torch.device | str = "cpu",
        trust_remote_code: bool = False,
        dtype: str | None = None,
        room: Room | None = None,
    ) -> None:
        super().__init__(checkpoint, layout, device, trust_remote_code, dtype, room)
        settings = read_json(folder / "config.json").get("quantization_config")
        self.compressed = Checkpoint(folder, compressed=settings is not None)
        self.entries = {} if settings is None else plain_entries(settings["modules"])
        self.tied = frozenset(self._tied())

    def _tied(self) -> Iterator[str]:
        wrappers, blocks = self.layout.wrappers, {x.name: x.block for x in self.layout.layers}
        for key, count in Counter(self.layout.stored.values()).items():
            if count > 1:
                yield unwrapped(key, wrappers)
        for name, entry in self.entries.items():
            if SHARED in entry and blocks[name] != blocks[entry[SHARED]]:
                yield self.key(f"{name}.{SHARED}")

    def key(self, name: str) -> str:
        """The key in the compressed folder of a tensor that the compressed model calls so."""
        layer, _, part = name.rpartition(".")
        if name in self.layout.stored:
            return unwrapped(self.layout.stored[name], self.layout.wrappers)
        owner = self.entries[layer].get(SHARED, layer) if _is_shared(part) else layer
        return self.key(f"{owner}.weight").removesuffix("weight") + part

    @contextmanager
    def loaded_compressed(
        self, block: int, changed: Mapping[str, Tensor] | None = None
    ) -> Iterator[nn.Module]:
        """A block as the compressed folder has it; its weights are freed when the context ends.

        Meanwhile :meth:`forward` and :meth:`differentiable` run this block.

        Args:
            block: Index of the block.
            changed: Key to the tensor that takes the place of the folder's.
        """
        module, path = self._blocks[block], self.layout.blocks[block]
        dense: dict[str, nn.Module] = {}
        try:
            for layer in self.layout.of_block(block):
                if layer.name in self.entries:
                    inside = layer.name[len(path) + 1 :]
                    dense[inside] = module.get_submodule(inside)
                    module.set_submodule(inside, self._empty(layer))
            self._fill(module, path, changed or {})
            yield module
        finally:
            for inside, linear in dense.items():
                module.set_submodule(inside, linear)
            drop_parameters(module)

    def differentiable(self, block: int, batch: Tensor) -> Tensor:
        """As :meth:`forward`, with gradients to the parameters that want some."""
        output: Tensor = inspect.unwrap(BlockStream.forward)(self, block, batch)
        return output

    @torch.no_grad()
    def advance(self, block: int, hidden: Tensor, batch_size: int) -> None:
        """Carries hidden states (samples, length, hidden) through the loaded block, in place."""
        for batch in hidden.split(batch_size):
            batch.copy_(self.forward(block, batch))

    def _empty(self, layer: LayerRef) -> nn.Module:
        entry = self.entries[layer.name]
        return CompressedLinear(
            layer.in_features,
            layer.out_features,
            entry,
            bias="bias" in entry or f"{layer.name}.bias" in self.layout.stored,
            transposed=layer.transposed,
            device="meta",
            dtype=self.dtype,
        ).eval()

    def _fill(self, module: nn.Module, path: str, changed: Mapping[str, Tensor]) -> None:
        """Reads the block's tensors; one that two of its layers have is read once."""
        made: dict[str, nn.Parameter] = {}
        for name, _ in list(module.named_parameters(remove_duplicate=False)):
            key = self.key(f"{path}.{name}")
            if key not in made:
                tensor = changed[key] if key in changed else self.compressed.read(key)
                value = tensor.to(self.device, self.dtype, copy=True)  # readers may give it again
                made[key] = nn.Parameter(value, requires_grad=False)
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner)._parameters[leaf] = made[key]
        for name, buffer in list(module.named_buffers()):
            owner, _, leaf = name.rpartition(".")
            place: Any = module.get_submodule(owner)
            if is_compressed(place):
                buffer = SLOTS[leaf].load(self.compressed.read(self.key(f"{path}.{name}")))
            elif f"{path}.{name}" in self.layout.stored:
                buffer = self.compressed.read(self.key(f"{path}.{name}")).to(buffer.dtype)
            place._buffers[leaf] = buffer.to(self.device)
        for part in module.modules():
            if is_compressed(part):
                try:
                    part.settle()
                except ValueError as error:
                    raise ModelError(
                        f"{self.compressed.folder}: {path}, {error}: it is damaged, get it again"
                    ) from error


class CompressedStream(FolderStream):
    """A compressed folder by itself, all of it read from its own files.

    Args:
        folder: A model folder that was written here.
        layout: Of the dense model that it was made of; None looks for it in the folder.
        device: Where blocks run.
        dtype: In which blocks run and hidden states are kept; None is the model's own.
        room: Where hidden states are kept.

    Raises:
        ModelError: The folder is incomplete, contradicts itself, or is of a newer format.
    """

    def __init__(
        self,
        folder: Path,
        layout: ModelLayout | None = None,
        device: torch.device | str = "cpu",
        dtype: str | None = None,
        room: Room | None = None,
    ) -> None:
        settings = read_json(folder / "config.json").get("quantization_config")
        checkpoint = Checkpoint(folder, compressed=settings is not None)
        if layout is None:
            own = inspect_model(checkpoint, binding=_bound)
        else:
            keys = {name: unwrapped(key, layout.wrappers) for name, key in layout.stored.items()}
            own = replace(layout, stored=keys, wrappers=())
        super().__init__(checkpoint, own, folder, device, False, dtype, room)
        try:
            check_version(settings["format_version"] if settings else 1)
            sizes = {layer.name: (layer.out_features, layer.in_features) for layer in own.layers}
            if unknown := sorted(self.entries.keys() - sizes.keys()):
                raise ValueError(f"{own.architecture} has no layer {unknown[0]!r} to compress")
            check_layers(self.entries, {name: sizes[name] for name in self.entries})
        except ValueError as error:
            raise ModelError(f"{folder}: {error}") from error

    @contextmanager
    def loaded(self, block: int) -> Iterator[nn.Module]:
        """A block as the folder has it."""
        with self.loaded_compressed(block) as module:
            yield module


def _bound(model: Any, checkpoint: Checkpoint) -> Binding:
    """Which of a compressed folder's tensors go where the dense model has some of that name."""
    binding = bind(model, checkpoint.names)
    if binding.missing:
        raise ModelError(
            f"{checkpoint.folder} has no tensor {binding.missing[0]!r}: it is incomplete, get it "
            "again"
        )
    return binding


def _is_shared(part: str) -> bool:
    return part in SLOTS and SLOTS[part].shared
