"""What a learner may keep where its numbers go into codes afterwards.

A learner counts numbers, all at one price, and codes do not cost that: the last group of a row may
be short, entries have places, biases stay in 16 bits. So it is given no more than what fits
whatever it chooses, at the dearest number of all.
"""

from collections.abc import Sequence

from compress_core.allocate.base import budget_of, least_kept
from compress_core.errors import BudgetError
from compress_core.sparse import index_bytes
from compress_core.types import LayerRef


def share_of_numbers(
    kept: float, layers: Sequence[LayerRef], *, entries: bool, biases: bool
) -> float:
    """The share of numbers that fits, in their codes, into ``kept`` of the room of 16-bit ones.

    Args:
        kept: In (0, 1], of the dense weights' numbers of 16 bits.
        layers: All of them, in the bits and groups that their numbers will have.
        entries: Whether layers may have sparse entries, whose places take room.
        biases: Whether they may have biases that the dense ones had not.

    Returns:
        In (0, 1]: where ``kept`` holds all whole weights in codes, all.

    Raises:
        BudgetError: Places and biases could take all of the room.
    """
    full = [layer.in_full for layer in layers]
    if sum(layer.dense_cost for layer in layers) <= budget_of(full, kept):
        return 1.0
    beside = sum(_beside(layer, entries, biases) for layer in layers)
    dearest = max(_dearest(layer) for layer in layers)
    whole = sum(layer.dense_cost for layer in full)
    share = (budget_of(full, kept) - beside) / dearest / whole
    if share <= 0:
        raise BudgetError(
            f"kept={kept:g} leaves nothing beside what is in no codes (places of entries, biases), "
            f"which may take {least_kept(beside, layers):g}: ask for more"
        )
    return min(1.0, share)


def _beside(layer: LayerRef, entries: bool, biases: bool) -> int:
    """The most that is in no codes, and the group of entries that is not full."""
    found = layer.out_features if biases else 0
    if entries:
        bits = layer.out_features * layer.in_features
        found += -(-index_bytes(layer.out_features, layer.in_features, bits) // 2)
        found += layer.entries_cost(1) + layer.group
    return found


def _dearest(layer: LayerRef) -> float:
    """Room of a number, of 16 bits, in whatever part takes most for it."""
    numbers = layer.out_features * layer.in_features
    whole = layer.dense_cost / numbers
    component = layer.atom_cost / layer.in_full.atom_cost
    group = layer.entries_cost(layer.group) / layer.group
    return max(whole, component, group)
