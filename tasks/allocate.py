"""Stage ``allocate``: one budget becomes each layer's share; reads kilobytes, never factors."""

from compress_core.method import Method
from compress_core.types import Share
from storage.artifact import Artifact
from tasks.components import code_of, describe
from tasks.convert import get_tensor
from tasks.model import DenseModel
from tasks.units import Group, Unit, View, Work


def allocate_group(
    model: DenseModel, method: Method, kept: float, decomposed: dict[str, Unit]
) -> Group:
    """The one unit that divides the budget.

    Args:
        model: The dense model.
        method: Gives the allocator.
        kept: Share of the compressible parameters that stays.
        decomposed: Layer name to its ``decompose`` unit.
    """
    layers = model.layout.layers
    reads = method.allocate.reads_losses

    def compute(work: Work) -> None:
        losses = {
            name: get_tensor(work.artifact(unit), "loss")
            for name, unit in (decomposed.items() if reads else ())
        }
        shares = method.allocate.allocate(layers, kept, losses)
        with work.draft(work.missing[0]) as draft:
            draft.attrs["ranks"] = {name: share.rank for name, share in shares.items()}

    unit = Unit(
        "allocate",
        "model",
        settings={
            **describe(method.allocate),
            "kept": kept,
            "layers": {layer.name: [layer.out_features, layer.in_features] for layer in layers},
        },
        code=[code_of(method.allocate)],
        inputs=decomposed if reads else {},
    )
    return Group("allocate", "model", [unit], compute)


def read_shares(artifact: Artifact) -> dict[str, Share]:
    """Layer name to its share."""
    return {name: Share(rank) for name, rank in artifact.attrs["ranks"].items()}


def rank_of(layer: str) -> View:
    """The part of an allocation that concerns one layer: its rank, or None for dense."""
    return lambda artifact: artifact.attrs["ranks"][layer]
