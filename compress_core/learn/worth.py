"""What an item is worth before anything is trained, and losses on windows.

CAP (arXiv 2505.03801) leaves the first probabilities open. Here an item is worth the energy that it
carries: σ² of a component and S_ij² of an entry, each as part of its layer's own energy, so that
layers of different scale can be compared; with ``activation`` every input counts by its mean square
E[x_j²], measured on the calibration windows; with ``gradient`` an item is worth what its absence
costs to second order (see ``gains``).
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from compress_core.gradients import token_loss
from compress_core.learn.items import Items
from compress_core.types import LayerRef, ModelLayout

METHOD = "cap"
Init = Literal["energy", "activation", "gradient"]
GRADIENTS = 128  # windows whose gradients are taken, at most
FORWARD = 8  # windows in one forward at most; it changes rounding only


@torch.no_grad()
def worths(items: Items, layout: ModelLayout, init: Init, windows: Tensor, device: str) -> Tensor:
    """Worth of every item per stored number, float32 (items,).

    Args:
        items: The model's, its weights still the dense ones.
        layout: The model's layout.
        init: "energy" or "activation".
        windows: Token ids (samples, length) on which inputs are measured; "energy" reads none.
        device: Where the model is.
    """
    squares = mean_squares(items.model, layout, windows, device) if init == "activation" else {}
    found = torch.empty(len(items), dtype=torch.float32)
    for layer, (components, entries) in zip(items.layers, items.parts(found), strict=True):
        atoms = items.atoms(layer)
        scale = squares.get(layer.tap, torch.ones(layer.in_features, dtype=torch.float64))
        weight = items.weight(layer).cpu().to(torch.float64)
        whole = float((weight.square() * scale).sum()) or 1.0
        energy = (atoms.v.to(torch.float64).square() * scale).sum(dim=1)
        components.copy_(energy / whole / layer.atom_cost)
        if atoms.sparse is not None:
            places = scale.expand(atoms.sparse.mask.shape)[atoms.sparse.mask]
            entries.copy_(atoms.sparse.values.to(torch.float64).square() * places / whole)
    return found


@torch.no_grad()
def mean_squares(
    model: Any, layout: ModelLayout, windows: Tensor, device: str
) -> dict[str, Tensor]:
    """E[x_j²] of every tap's input over the windows, float64 (in,) on the CPU."""
    sums: dict[str, Tensor] = {}

    def adding(layer: LayerRef) -> Callable[..., None]:
        def hook(_: Any, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].reshape(-1, inputs[0].shape[-1]).to(torch.float64)
            total = rows.square().sum(dim=0)
            sums[layer.tap] = sums[layer.tap] + total if layer.tap in sums else total

        return hook

    handles = [
        model.get_submodule(layer.name).register_forward_pre_hook(adding(layer))
        for layer in layout.layers
        if layer.name == layer.tap
    ]
    try:
        for batch in windows.split(FORWARD):
            model.base_model(input_ids=batch.to(device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {tap: (total / windows.numel()).cpu() for tap, total in sums.items()}


@torch.no_grad()
def mean_loss(model: Any, windows: Tensor, device: str) -> Tensor:
    """Mean loss of predicted tokens over many windows, a few at a time: float64, on the CPU."""
    total = torch.zeros((), dtype=torch.float64)
    for batch in windows.split(FORWARD):
        total += len(batch) * token_loss(model, batch.to(device)).to("cpu", torch.float64)
    return total / len(windows)


def hold_back(windows: Tensor) -> tuple[Tensor, Tensor]:
    """Windows to learn from, and the last eighth, to report on and to choose between results."""
    held = max(1, len(windows) // 8)
    return windows[:-held], windows[-held:]
