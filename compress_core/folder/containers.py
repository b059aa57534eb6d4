"""Puts two plain linear layers in the place of one, where a model's config says so.

Its text goes into every folder written for vLLM, so it needs PyTorch alone. vLLM's Transformers
backend makes a layer of its own of every `nn.Linear` it finds, by in and out features: a container
that is none itself, with two that are, comes out right.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn


class LinearPair(nn.Module):
    """y = (x W_inᵀ) W_outᵀ + b, as two plain linear layers.

    Attributes:
        in_factor: (rank, in), without a bias.
        out_factor: (out, rank), with the layer's bias.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.in_factor = nn.Linear(in_features, rank, bias=False)
        self.out_factor = nn.Linear(rank, out_features, bias=bias)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (..., in) to (..., out) through rank numbers."""
        return self.out_factor(self.in_factor(input))


def pair_linears(model: nn.Module, layers: Mapping[str, Any], prefix: str = "") -> None:
    """Replace the named linear layers by empty pairs, in place.

    Args:
        model: The model, or its base model together with `prefix`.
        layers: Name in the whole causal model -> "rank", "in_features", "out_features", "bias".
        prefix: What the names carry in front when `model` is the base model, like "model.".
    """
    inside: dict[str, set[str]] = {}
    for name, sizes in layers.items():
        if name.startswith(prefix):
            path = name[len(prefix) :]
            weight: Any = model.get_submodule(path).weight
            pair = LinearPair(**sizes).to(device=weight.device, dtype=weight.dtype)
            model.set_submodule(path, pair)
            parent, _, child = path.rpartition(".")
            inside.setdefault(parent, set()).add(child)
    _tell_apart(model, inside)


def require_pairs(model: nn.Module, missing: Iterable[str]) -> None:
    """Raise ValueError if a factor is missing: transformers would fill it with random numbers."""
    paths = {path for path, module in model.named_modules() if isinstance(module, LinearPair)}
    lost = sorted(key for key in missing if key.rsplit(".", 2)[0] in paths)
    if lost:
        raise ValueError(
            f"the checkpoint has no {lost[0]} ({len(lost)} of its factors and biases missing): it "
            "is incomplete, export the model again"
        )


def pair_plan(plan: Mapping[str, str], modules: Iterable[tuple[str, nn.Module]]) -> dict[str, str]:
    """A tensor-parallel plan in which pairs are divided along the side that the dense layer was.

    The out-factor of a layer that was cut by its outputs is cut by them and its in-factor is whole
    everywhere; the in-factor of one that was cut by its inputs is, and its sum is whole.

    Args:
        plan: The architecture's own: pattern with `*` for a block's number -> style.
        modules: Names and modules of the model after `pair_linears`.
    """
    layers: dict[str, list[tuple[str, bool]]] = {}
    for name, module in modules:
        pattern = re.sub(r"\d+", "*", name)
        layers.setdefault(pattern, []).append((name, isinstance(module, LinearPair)))
    divided: dict[str, str] = {}
    for pattern, style in plan.items():
        these = layers.get(pattern, [])
        if not any(pair for _, pair in these):
            divided[pattern] = style
            continue
        # A pattern counts for whatever begins with it, so dense layers are named one by one.
        divided |= {name: style for name, pair in these if not pair}
        if style.startswith("colwise"):
            divided[f"{pattern}.out_factor"] = style
        elif style.startswith("rowwise"):
            divided[f"{pattern}.in_factor"] = style
    return divided


def _tell_apart(model: nn.Module, inside: Mapping[str, set[str]]) -> None:
    """Give modules that hold pairs a class for each set of children that are pairs.

    vLLM looks at one module of every class (and, in 0.33, names of children) to see whether its
    q, k, v or gate, up can be merged, and merges those of all of them; but here blocks may differ
    in which of their layers are pairs.
    """
    classes: dict[tuple[type, frozenset[str]], type] = {}
    for path, children in inside.items():
        module = model.get_submodule(path)
        stock = type(module)
        key = stock, frozenset(children)
        if key not in classes:
            # under the same name, by which transformers chooses what not to split, and more
            classes[key] = type(stock.__name__, (stock,), {"__module__": stock.__module__})
        module.__class__ = classes[key]
