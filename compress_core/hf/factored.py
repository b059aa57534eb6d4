"""A linear layer held as two thin factors, and the swap that puts it into a model.

It computes y = (x factor_inᵀ) weightᵀ + bias with weight (out, rank) and factor_in (rank, in). This
file needs PyTorch alone: its text is also written into the folder of every compressed model, so
that the model loads where nothing else of eigenpress is installed.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import nn

FORMAT_VERSION = 1


class FactoredLinear(nn.Linear):
    """A linear layer whose weight is a product, `weight` (out, rank) @ `factor_in` (rank, in).

    It is an `nn.Linear` so that whatever looks for linear layers (LoRA, for one) finds it. The
    out-factor is called `weight` on purpose: a class that knows nothing of factors then fails on
    its shape when it loads the checkpoint, where a name of its own would leave random numbers.

    LoRA adapters train on top but cannot be merged into it: PEFT's `merge_and_unload` raises a
    RuntimeError about sizes, because the adapter's (out, in) update has no place in (out, rank).
    Keep the adapter beside the model, or call `model.dequantize()` before training it. Of PEFT's
    other methods most raise too; MiSS does not and would merge to wrong numbers.

    Attributes:
        weight: The out-factor, (out, rank).
        factor_in: The in-factor, (rank, in).
        bias: (out,), or None.
        transposed: Whether the dense layer kept its weight as (in, out), as GPT-2's Conv1D does.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        transposed: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # nn.Linear's own constructor would allocate and draw a dense weight only to discard it.
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.transposed = transposed
        # Not-a-number until loaded: a factor that was forgotten must not pass for a result.
        self.weight = _unset(out_features, rank, device=device, dtype=dtype)
        self.factor_in = _unset(rank, in_features, device=device, dtype=dtype)
        if bias:
            self.bias = _unset(out_features, device=device, dtype=dtype)
        else:
            self.register_parameter("bias", None)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (..., in) to (..., out) through rank numbers."""
        return F.linear(F.linear(input, self.factor_in), self.weight, self.bias)

    def dense_weight(self) -> torch.Tensor:
        """The product of the factors, (out, in), rounded once to their dtype."""
        return product(self.weight, self.factor_in)

    def extra_repr(self) -> str:
        """The sizes, for printing a model."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, rank={self.rank}, bias={self.bias is not None}"


def is_factored(module: nn.Module) -> TypeGuard[FactoredLinear]:
    """Whether a module is a FactoredLinear, of this copy of the file or of another."""
    return type(module).__name__ == "FactoredLinear" and "factor_in" in module._parameters


def product(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """u (out, rank) times v (rank, in), computed in a wider dtype than theirs and rounded once."""
    wide = torch.float64 if u.dtype.itemsize >= 4 else torch.float32
    return (u.to(wide) @ v.to(wide)).to(u.dtype)


def pays(out_features: int, in_features: int, rank: int) -> bool:
    """Whether factors of this rank hold fewer numbers than the dense weight."""
    return rank >= 1 and rank * (out_features + in_features) < out_features * in_features


def factorise(
    model: nn.Module,
    modules: Mapping[str, Mapping[str, Any]],
    prefix: str = "",
    format_version: int = FORMAT_VERSION,
) -> nn.Module:
    """Replace the named linear layers by empty FactoredLinear ones of the given ranks, in place.

    Args:
        model: The model, or its base model together with `prefix`; may be on the meta device.
        modules: Layer name -> {"rank": int}, names as in the whole causal model.
        prefix: What the names carry in front when `model` is the base model, like "model.". Layers
            outside the base model are then left out.
        format_version: Version of the checkpoint format that `modules` comes from.

    Returns:
        The same model. Layers that are factored already stay as they are.

    Raises:
        ValueError: The format is newer than this code, a name is unknown or not a linear layer, or
            a rank is below one or would cost as much as the dense weight.
    """
    check_version(format_version)
    for name, entry in modules.items():
        if name.startswith(prefix):
            _replace(model, name[len(prefix) :], int(entry["rank"]))
    return model


def factorise_from_config(model: nn.Module, config: Any, prefix: str = "") -> None:
    """Apply `factorise` with what a model's config says, or nothing where it says nothing."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return
    settings = settings if isinstance(settings, Mapping) else settings.to_dict()
    factorise(model, settings["modules"], prefix, settings["format_version"])


def require_factors(missing: Iterable[str]) -> None:
    """Raise ValueError if in-factors are among the missing keys: transformers would only warn."""
    lost = sorted(key for key in missing if key.endswith(".factor_in"))
    if lost:
        raise ValueError(
            f"the checkpoint has no {lost[0]} ({len(lost)} factors missing): it is incomplete, "
            "get the model again"
        )


def check_version(format_version: int) -> None:
    """Raise ValueError for a checkpoint format that is newer than this code."""
    if format_version > FORMAT_VERSION:
        raise ValueError(
            f"the checkpoint has eigenpress format {format_version}, this code reads up to "
            f"{FORMAT_VERSION}: update eigenpress, or load with the model's own code"
        )


def _unset(*shape: int, device: Any, dtype: torch.dtype | None) -> nn.Parameter:
    return nn.Parameter(torch.full(shape, math.nan, device=device, dtype=dtype))


def _replace(model: nn.Module, name: str, rank: int) -> None:
    parent_name, _, child_name = name.rpartition(".")
    try:
        parent = model.get_submodule(parent_name)
        dense: Any = parent.get_submodule(child_name)
    except AttributeError:
        raise ValueError(f"{type(model).__name__} has no layer {name!r} to factorise") from None
    transposed = type(dense).__name__ == "Conv1D"
    if not transposed and not isinstance(dense, nn.Linear):
        raise ValueError(f"layer {name!r} is a {type(dense).__name__}, not a linear layer")
    if is_factored(dense):
        if dense.rank != rank:
            raise ValueError(f"layer {name!r} has rank {dense.rank} already, not {rank}")
        return
    out_features, in_features = dense.weight.shape[::-1] if transposed else dense.weight.shape
    if not pays(out_features, in_features, rank):
        raise ValueError(
            f"layer {name!r} ({out_features}, {in_features}) cannot have rank {rank}: it must be "
            "at least 1 and the factors smaller than the dense weight"
        )
    factored = FactoredLinear(
        in_features,
        out_features,
        rank,
        bias=False,
        transposed=transposed,
        device=dense.weight.device,
        dtype=dense.weight.dtype,
    )
    factored.bias = dense.bias
    setattr(parent, child_name, factored.train(dense.training))
