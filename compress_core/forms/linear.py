"""The one linear layer of compressed models: a sum of parts, and a bias."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import nn

from compress_core.forms.coded import decoded, outlined
from compress_core.forms.columns import input_order
from compress_core.forms.kinds import (
    SLOTS,
    check_parts,
    dense_of,
    kinds_of,
    layouts_of,
    plain_entry,
    shapes_of,
    sizes_of,
)
from compress_core.forms.part import Entry, Run, Tensors

_OLD_NAMES = ("FactoredLinear", "SparseLinear", "QuantisedLinear")


class CompressedLinear(nn.Linear):
    """A linear layer whose weight is a sum of parts, each of a kind of its own.

    It is an `nn.Linear` so that whatever looks for linear layers (LoRA, for one) finds it. One part
    has a tensor called `weight` on purpose: a class that knows nothing of parts then fails on its
    shape when it loads the checkpoint, where a name of its own would leave random numbers.

    How it computes follows from sizes, dtype and device alone, so that results repeat: part by
    part, or, where some are scattered and it is slower so, with the whole weight, put together
    once and kept. What is kept is made on first use, made again when its parts change, and never
    saved. Numbers in codes are decoded in every forward, and kept only where they are part of that.

    LoRA adapters train on top but cannot be merged into it: PEFT's `merge_and_unload` raises a
    RuntimeError about sizes, because the adapter's (out, in) update has no place in `weight`.
    Keep the adapter beside the model, or call `model.dequantize()` before training it. Of PEFT's
    other methods most raise too; MiSS does not and would merge to wrong numbers.

    Attributes:
        entry: What config.json says of it, in which every kind finds its own.
        kinds: Of its parts. Their tensors are parameters and buffers of the layer.
        layouts: Of those that are in codes, whose scales are parameters and whose codes buffers.
        bias: (out,), or None.
        transposed: Whether the dense layer kept its weight as (in, out), as GPT-2's Conv1D does.
        layer_name: Its name in the checkpoint's list of layers.
    """

    column_index: Any

    def __init__(
        self,
        in_features: int,
        out_features: int,
        entry: Entry,
        bias: bool = True,
        *,
        transposed: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # nn.Linear's own constructor would allocate and draw a dense weight only to discard it.
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.entry = plain_entry(entry)
        self.kinds = kinds_of(self.entry)
        self.sizes = sizes_of(out_features, in_features, self.entry)
        self.layouts = layouts_of(self.entry, self.sizes)
        self.transposed, self.layer_name = transposed, ""
        shapes = shapes_of(self.entry, self.sizes)
        self.parts = tuple(shapes)
        for name, shape in shapes.items():
            slot = SLOTS[name]
            # Not-a-number until loaded: what was forgotten must not pass for a result.
            tensor = torch.full(shape, slot.fill, device=device, dtype=slot.dtype or dtype)
            if slot.dtype is None:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)
        self.register_parameter(
            "bias", unset(out_features, device=device, dtype=dtype) if bias else None
        )
        self._kept: dict[str, tuple[Any, torch.Tensor]] = {}

    @property
    def shared_with(self) -> str | None:
        """Name of the layer whose in-factor this one uses, or None."""
        return self.entry.get("factor_in")

    @property
    def shared_parts(self) -> tuple[str, ...]:
        """Names of its tensors that are another layer's."""
        return tuple(name for name in self.parts if self.shared_with and SLOTS[name].shared)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (..., in) to (..., out)."""
        tensors = self.tensors()
        traced = torch.compiler.is_compiling() or input.is_meta or self._wants_gradients(input)
        if not traced and self.runs_whole(self.weight.device):
            weight = self._keep("whole", list(tensors.values()), self.dense_weight)
            return F.linear(input, weight, self.bias)
        tensors = decoded(self.layouts, tensors, None if traced else self._keep_scattered)
        run, views = Run(self._keep, traced), self._views(input)
        bias: torch.Tensor | None = self.bias
        out: torch.Tensor | None = None
        for kind in self._running():
            part = kind.apply(views[kind.reads], tensors, self.sizes, bias, run)
            out, bias = (part if out is None else out + part), None
        assert out is not None
        return out

    def tensors(self) -> Tensors:
        """What it stores but the bias, by name."""
        return {name: getattr(self, name) for name in self.parts}

    def dense_weight(self) -> torch.Tensor:
        """What the layer stands for, (out, in): the sum of its parts rounded once."""
        return dense_of(self.entry, self.tensors(), self.sizes)

    def runs_whole(self, device: torch.device) -> bool:
        """Whether it multiplies by the whole weight on `device`, where no gradients are wanted."""
        if not any(kind.scattered for kind in self.kinds):
            return False
        dtype = self.weight.dtype
        work = sum(kind.work(self.entry, self.sizes, device, dtype) for kind in self.kinds)
        return work > self.sizes.dense

    def masks(self) -> Tensors:
        """Where in the weight the numbers of a tensor are, (out, in), of those that are sparse.

        Of a tensor in codes, whose scales are no such numbers, there is none.
        """
        tensors = outlined(self.layouts, self.tensors())
        masks = [kind.masks(tensors, self.sizes) for kind in self.kinds]
        return {
            name: mask
            for found in masks
            for name, mask in found.items()
            if name not in self.layouts
        }

    def kept_tensors(self) -> Iterator[torch.Tensor]:
        """What it has derived of its parts and keeps."""
        for _, kept in self._kept.values():
            if kept.layout is torch.sparse_csr:
                yield from (kept.crow_indices(), kept.col_indices(), kept.values())
            else:
                yield kept

    def expected_kept_bytes(self, device: torch.device) -> int:
        """Bytes of that after a forward without gradients; those of parts themselves apart."""
        if self.runs_whole(device):
            return self.sizes.dense * self.weight.dtype.itemsize
        numbers = sum(math.prod(self.layouts[name].of.shape) for name in self._scattered())
        kept = sum(kind.kept_bytes(self.entry, self.sizes) for kind in self.kinds)
        return kept + numbers * self.weight.dtype.itemsize

    def settle(self) -> None:
        """Give loaded integers their dtype in memory, which loaders do not.

        Raises:
            ValueError: They name what is not there.
        """
        tensors = self.tensors()
        check_parts(self.entry, tensors, self.sizes)
        for name, tensor in tensors.items():
            if SLOTS[name].dtype is not None:
                setattr(self, name, SLOTS[name].load(tensor))

    def extra_repr(self) -> str:
        """The sizes, for printing a model."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        says = ", ".join(f"{key}={value}" for key, value in self.entry.items() if key != "bias")
        return f"{sizes}, {says}, bias={self.bias is not None}"

    @property
    def _tied_weights_keys(self) -> dict[str, str]:
        # transformers reads it from every module to know what a checkpoint may leave out.
        return {"factor_in": "factor_in"} if self.shared_with else {}

    def _running(self) -> Sequence[Any]:
        """The parts that have something in them: a product of rank 0 only where it is all."""
        if self.entry["rank"]:
            return self.kinds
        return [kind for kind in self.kinds if "rank" not in kind.keys] or self.kinds

    def _views(self, input: torch.Tensor) -> dict[str, torch.Tensor]:
        """What each part may read of the inputs."""
        sizes = self.sizes
        if not sizes.taken:
            return {"all": input, "rest": input}
        index = self.column_index
        order = self._keep("order", [index], lambda: input_order(index, sizes.inputs))
        # On the CPU index_select along the last axis takes ten times as long as this gather.
        ordered = input.gather(-1, order.expand(input.shape))
        rest, taken = ordered.split((sizes.rest, sizes.taken), dim=-1)
        return {"all": input, "rest": rest, "taken": taken}

    def _scattered(self) -> list[str]:
        """Tensors in codes of parts that keep what they derive of them."""
        names = [name for kind in self.kinds if kind.scattered for name in kind.slots]
        return [name for name in names if name in self.layouts]

    def _keep_scattered(
        self, name: str, of: Sequence[torch.Tensor], decode: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """A tensor decoded: anew, or as it is kept for those parts."""
        return self._keep(name, of, decode) if name in self._scattered() else decode()

    def _wants_gradients(self, input: torch.Tensor) -> bool:
        parameters = self.parameters(recurse=False)
        return torch.is_grad_enabled() and (
            input.requires_grad or any(parameter.requires_grad for parameter in parameters)
        )

    def _keep(
        self, what: str, of: Sequence[torch.Tensor], derive: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """What is derived of tensors, as kept or new."""
        if torch.compiler.is_compiling() or any(part.is_inference() or part.is_meta for part in of):
            return derive()  # tensors of inference do not say when they change
        # Another tensor is another object or has other memory; writing into one raises its version.
        state = [(part, part._version, part.data_ptr()) for part in of]
        found = self._kept.get(what)
        if found is None or not _same(found[0], state):
            # Either the whole weight is needed or what parts keep: never the memory of both.
            for name in [name for name in self._kept if name == what or "whole" in (name, what)]:
                del self._kept[name]
            with torch.inference_mode(False), torch.no_grad():  # so that it can serve training
                found = self._kept[what] = (state, derive())
        return found[1]

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._kept = {}  # moving and casting change parameters in place and leave no trace
        return super()._apply(*args, **kwargs)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.parts:
            if SLOTS[name].dtype is not None:
                key = f"{prefix}{name}"
                destination[key] = SLOTS[name].save(destination[key], self.sizes)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name in self.parts:
            if (key := f"{prefix}{name}") in state_dict and SLOTS[name].dtype is not None:
                state_dict[key] = SLOTS[name].load(state_dict[key])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}


def is_compressed(module: nn.Module) -> TypeGuard[Any]:
    """Whether a module is a compressed layer, of this copy of the files or of another."""
    return type(module).__name__ == "CompressedLinear" and hasattr(module, "entry")


def is_of_old_copy(module: nn.Module) -> bool:
    """Whether a module is a compressed layer of the code in a folder of format 1, 2 or 3."""
    return type(module).__name__ in _OLD_NAMES and hasattr(module, "transposed")


def unset(*shape: int, device: Any, dtype: torch.dtype | None) -> nn.Parameter:
    """A parameter that is not-a-number until it is loaded."""
    return nn.Parameter(torch.full(shape, float("nan"), device=device, dtype=dtype))


def _same(state: Any, other: Any) -> bool:
    return len(state) == len(other) and all(
        one is two and facts == more
        for (one, *facts), (two, *more) in zip(state, other, strict=True)
    )
