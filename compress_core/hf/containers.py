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
    for name, sizes in layers.items():
        if name.startswith(prefix):
            path = name[len(prefix) :]
            weight: Any = model.get_submodule(path).weight
            pair = LinearPair(**sizes).to(device=weight.device, dtype=weight.dtype)
            model.set_submodule(path, pair)
    # vLLM looks at one module of a class and names of children to see which linear layers can be
    # merged, and merges those of all. Blocks may differ, so a child's name says which are pairs.
    for module in list(model.modules()):
        pairs = [name for name, child in module.named_children() if isinstance(child, LinearPair)]
        if pairs:
            module.add_module("pairs_" + "_".join(pairs), nn.Identity())


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
