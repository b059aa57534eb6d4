"""What recovery trains: the stored tensors of the compressed layers, whole or by a low-rank update.

The model always runs with what would be stored, in the dtype it would be stored in; what is trained
are leaves in float32, from which the stored tensors are made after every step. So the loss that is
measured is that of the model that comes out, and an update is merged before it is ever used.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from compress_core.forms.kinds import SLOTS
from compress_core.forms.linear import is_compressed

LEAST_SIZE = 1e-3  # of a tensor that is all zeros, like a new bias


@dataclass(frozen=True)
class Stored:
    """A stored tensor of a compressed layer.

    Attributes:
        layer: The layer's name; of layers that share the tensor, the one that stores it.
        part: What it is called there, in the model and in its files.
        tensor: The parameter that the model runs with.
        mask: Where its entries are in the weight, (out, in), if it is a sparse part's values.
        dtype: Of its file, where that is not the parameter's: a model may run in another one.
    """

    layer: str
    part: str
    tensor: nn.Parameter
    mask: Tensor | None = None
    dtype: torch.dtype | None = None

    @property
    def inward(self) -> bool:
        """Whether another tensor of the layer stands between it and the outputs."""
        return self.part in SLOTS and SLOTS[self.part].inward

    @property
    def name(self) -> str:
        """Layer and part."""
        return f"{self.layer}.{self.part}"

    def put(self, value: Tensor) -> None:
        """The parameter gets a value as its file would give it back."""
        self.tensor.copy_(value.to(self.dtype or self.tensor.dtype))

    def get(self) -> Tensor:
        """What its file will hold, on the CPU."""
        return self.tensor.detach().to("cpu", self.dtype)


def stored_tensors(
    model: nn.Module, dtypes: Mapping[str, torch.dtype] | None = None
) -> Iterator[Stored]:
    """All numbers that compressed layers store, of any kind, those that are shared once.

    Args:
        model: The compressed model.
        dtypes: Name of a stored tensor to the dtype of its file; of others it is the parameter's.
    """
    for name, module in model.named_modules():
        if not is_compressed(module):
            continue
        masks = module.masks()
        for part, tensor in module.named_parameters(recurse=False):
            if part in module.shared_parts or not tensor.numel():
                continue
            dtype = (dtypes or {}).get(f"{name}.{part}")
            yield Stored(name, part, tensor, masks.get(part), dtype)


def first_in_codes(model: nn.Module) -> str | None:
    """The first compressed layer that holds numbers in codes, which cannot be trained."""
    for name, module in model.named_modules():
        if is_compressed(module) and "codes" in module.entry:
            return name
    return None


class Part(Protocol):
    """How a stored tensor follows from what is trained."""

    stored: Stored
    leaves: list[Tensor]  # float32; after `pull` with gradients
    scales: list[float]  # a leaf's step for η = 1, which changes the tensor by its own size

    def put(self) -> None:
        """Makes the stored tensor of the leaves."""
        ...

    def pull(self, scale: float) -> None:
        """Turns the stored tensor's gradient, over ``scale``, into the leaves', and frees it."""
        ...


class Whole:
    """Every number of the tensor is trained."""

    def __init__(self, stored: Stored) -> None:
        self.stored = stored
        wide = torch.promote_types(stored.tensor.dtype, torch.float32)
        self.leaves = [stored.tensor.detach().to(wide, copy=True)]
        self.scales = [size_of(stored.tensor)]

    @torch.no_grad()
    def put(self) -> None:
        """Rounds the leaf to the stored dtype."""
        self.stored.put(self.leaves[0])

    def pull(self, scale: float) -> None:
        """The gradient as it is, widened."""
        self.leaves[0].grad = _take_gradient(self.stored.tensor, self.leaves[0].dtype, scale)


class LowRankUpdate:
    """The tensor plus a product of low rank, which starts at zero.

    The values of a sparse part get that product's entries at their places.

    Args:
        stored: The tensor: a matrix, or values with their mask.
        rank: Of the product; no more than the tensor allows.
        generator: Draws the product's right factor.
    """

    def __init__(self, stored: Stored, rank: int, generator: torch.Generator) -> None:
        self.stored = stored
        tensor = stored.tensor.detach()
        rows, columns = (tensor if stored.mask is None else stored.mask).shape
        rank = min(rank, rows, columns)
        wide = torch.promote_types(tensor.dtype, torch.float32)
        right = torch.randn(rank, columns, generator=generator) / math.sqrt(rank)
        self.start = tensor.clone()
        # The product is measured in the tensor's own size, so that a step of the left factor
        # changes the tensor by the same share of it as a step of the whole tensor would.
        self.size = size_of(tensor)
        self.leaves = [
            torch.zeros(rows, rank, dtype=wide, device=tensor.device),
            right.to(tensor.device, wide),
        ]
        self.scales = [1.0, 1 / math.sqrt(rank)]

    @torch.no_grad()
    def put(self) -> None:
        """Merges the update; an update of zero leaves every bit as it was."""
        left, right = self.leaves
        if not bool(left.any()):
            self.stored.put(self.start)
            return
        update = (left @ right) * self.size
        if self.stored.mask is not None:
            update = update[self.stored.mask]
        self.stored.put(self.start.to(update.dtype) + update)

    def pull(self, scale: float) -> None:
        """The chain rule through the product."""
        left, right = self.leaves
        gradient = _take_gradient(self.stored.tensor, left.dtype, scale)
        if gradient is None:
            return
        if self.stored.mask is not None:
            places = torch.zeros(
                self.stored.mask.shape, dtype=gradient.dtype, device=gradient.device
            )
            gradient = places.masked_scatter_(self.stored.mask, gradient)
        left.grad = (gradient @ right.T) * self.size
        right.grad = (left.T @ gradient) * self.size


def size_of(tensor: Tensor) -> float:
    """Root mean square, with a floor for a tensor of zeros."""
    return max(float(tensor.detach().double().square().mean().sqrt()), LEAST_SIZE)


def _take_gradient(tensor: nn.Parameter, dtype: torch.dtype, scale: float) -> Tensor | None:
    gradient, tensor.grad = tensor.grad, None
    return None if gradient is None else gradient.to(dtype) / scale
