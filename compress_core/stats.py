"""What is measured at a tap (an input that one or more linear layers share).

H = Σ x xᵀ and Σ |x| over calibration tokens, accumulated in float64 from the model's own dtype.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compress_core.errors import NumericsError


@dataclass(frozen=True)
class InputStats:
    """Statistics of one tap.

    Attributes:
        tokens: Number of token vectors seen.
        gram: Σ x xᵀ, float64 (in, in), symmetric.
        abs_sum: Σ |x|, float64 (in,).
    """

    tokens: int
    gram: Tensor
    abs_sum: Tensor


class InputAccumulator:
    """Streams token vectors into :class:`InputStats`; the order of batches changes only rounding.

    Args:
        features: Width of the input.
        device: Where the sums live.
        products: Dtype in which one batch's products are formed; the sums are always float64.
    """

    def __init__(
        self,
        features: int,
        device: torch.device | str = "cpu",
        products: torch.dtype = torch.float64,
    ) -> None:
        self.tokens = 0
        self.products = products
        self.gram = torch.zeros(features, features, dtype=torch.float64, device=device)
        self.abs_sum = torch.zeros(features, dtype=torch.float64, device=device)

    def add(self, inputs: Tensor, first_sample: int = 0) -> None:
        """Adds one batch.

        Args:
            inputs: (samples, ..., in), any floating dtype.
            first_sample: Index of the batch's first sample, for the error message only.

        Raises:
            NumericsError: A value is not finite; the message names the sample.
        """
        if not torch.isfinite(inputs).all():
            rows = inputs.reshape(inputs.shape[0], -1).isfinite().all(dim=1)
            sample = first_sample + int((~rows).nonzero()[0])
            raise NumericsError(f"input is not finite at calibration sample {sample}")
        rows = inputs.reshape(-1, inputs.shape[-1]).to(self.products)  # (tokens, in)
        self.tokens += rows.shape[0]
        self.gram += rows.T @ rows
        self.abs_sum += rows.abs().sum(dim=0)

    def finish(self) -> InputStats:
        """The statistics so far, with the Gram made exactly symmetric."""
        return InputStats(self.tokens, (self.gram + self.gram.T) / 2, self.abs_sum)
