"""Whether all numbers of a tensor are finite, at the speed at which a tensor is read."""

import torch
from torch import Tensor


@torch.no_grad()
def all_finite(values: Tensor) -> bool:
    """Whether no number is infinite or NaN.

    The smallest and the largest say so, as NaN is passed on to both. ``values.isfinite().all()``
    makes a tensor of answers first and takes ten times as long on a CPU.

    Args:
        values: Of any shape, none among them, and any real dtype.
    """
    if not values.numel():
        return True
    low, high = torch.aminmax(values)
    return bool(low.isfinite() & high.isfinite())


def first_bad(rows: Tensor) -> int | None:
    """Index of the first of ``rows`` (rows, ...) with a number that is not finite; None if none."""
    if all_finite(rows):
        return None
    return int((~rows.reshape(len(rows), -1).isfinite().all(1)).nonzero()[0])
