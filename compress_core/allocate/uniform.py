"""The same share of every layer: rank = floor(kept · out · in / (out + in)), as the papers do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from compress_core.errors import BudgetError
from compress_core.types import LayerRef, Share, affordable


class Allocator(Protocol):
    """Divides a budget; never spends more than it was given."""

    reads_losses: ClassVar[bool]  # whether it looks at the decompositions' loss curves

    def allocate(
        self, layers: Sequence[LayerRef], kept: float, losses: Mapping[str, Tensor]
    ) -> dict[str, Share]:
        """Each layer's share, for ``kept`` of the compressible parameters.

        Args:
            layers: Every compressible layer.
            kept: In (0, 1], of the compressible parameters.
            losses: Layer name to its loss curve (ranks + 1,); empty unless ``reads_losses``.
        """
        ...


@dataclass(frozen=True)
class Uniform:
    """Every layer keeps the same share; a layer whose factors would not pay stays dense."""

    reads_losses: ClassVar[bool] = False

    def allocate(
        self, layers: Sequence[LayerRef], kept: float, losses: Mapping[str, Tensor]
    ) -> dict[str, Share]:
        """Floors each layer's rank.

        Raises:
            BudgetError: A layer would be left with no component at all.
        """
        shares = {}
        for layer in layers:
            rank = affordable(kept, layer.dense_cost) // layer.atom_cost
            if rank == 0:
                needed = max(other.atom_cost / other.dense_cost for other in layers)
                raise BudgetError(
                    f"kept={kept:g} leaves layer {layer.name} ({layer.out_features}x"
                    f"{layer.in_features}) without a single component; this model needs kept of "
                    f"at least {min(1.0, needed + 5e-5):.4f}"
                )
            shares[layer.name] = Share(rank if rank <= layer.paying_rank and kept < 1 else None)
        return shares
