"""How many windows one forward takes where nobody says: what fits into a modest part of memory."""

from compress_core.types import ModelLayout

CPU_BYTES, CPU_WINDOWS = 1 << 28, 8
"""Of a batch's activations on a CPU, where more windows at once save no time, in bytes."""
ACCELERATOR_BYTES, ACCELERATOR_WINDOWS = 1 << 31, 64
"""The same on an accelerator, whose kernels want more rows."""
FREE_SHARE = 8
"""A batch takes one in so many of the bytes that are free; models and metrics need the others."""
WIDE = 4
"""Bytes of a number: some of a block's activations are float32 in any model."""


def windows_at_once(layout: ModelLayout, length: int, free: int, device: str) -> int:
    """How many windows one forward takes: hidden states and one block's activations fit.

    What a block holds is counted as everything that its layers read and return. The bounds by kind
    of device are so low that free memory decides only where it is scarce: the same machine takes
    the same batch, and so makes the same bytes, whatever else runs on it.

    Args:
        layout: The model's layout.
        length: Tokens per window.
        free: Bytes of the device's memory that are free.
        device: Name of the device.

    Returns:
        At least 1.
    """
    cpu = device.partition(":")[0] == "cpu"
    most_bytes = CPU_BYTES if cpu else ACCELERATOR_BYTES
    most_windows = CPU_WINDOWS if cpu else ACCELERATOR_WINDOWS
    budget = min(most_bytes, free // FREE_SHARE)
    return max(1, min(most_windows, budget // activation_bytes(layout, length)))


def activation_bytes(layout: ModelLayout, tokens: int) -> int:
    """Bytes of a block's activations for so many tokens at once."""
    numbers = max(
        sum(layer.in_features + layer.out_features for layer in layout.of_block(block))
        for block in range(len(layout.blocks))
    )
    return WIDE * numbers * tokens
