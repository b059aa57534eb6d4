"""What is measured at a tap (an input that one or more linear layers share).

H = Σ x xᵀ and Σ |x| over calibration tokens, accumulated in float64 from the model's own dtype. On
a model whose earlier layers are compressed already, the same tokens' dense inputs are kept as the
cross statistics Σ x_dense xᵀ.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from compress_core.errors import NumericsError
from compress_core.finite import first_bad
from compress_core.record import Packed, Record, pack_symmetric, unpack_symmetric

STRIPS_FROM = 512  # width; products of narrower inputs are too small to be worth dividing
STRIP = 192


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

    @property
    def moment(self) -> Tensor:
        """E[x xᵀ], float64 (in, in)."""
        return self.gram / self.tokens

    def pack(self) -> Packed:
        """What is kept of it: of the symmetric Gram only the lower triangle."""
        tensors = {"gram": pack_symmetric(self.gram), "abs_sum": self.abs_sum}
        return Packed(tensors, {"tokens": self.tokens})

    @classmethod
    def unpack(cls, record: Record) -> "InputStats":
        """The statistics that :meth:`pack` kept."""
        abs_sum = record.tensor("abs_sum")
        gram = unpack_symmetric(record.tensor("gram"), len(abs_sum))
        return cls(int(record.attrs["tokens"]), gram, abs_sum)

    @classmethod
    def summed(cls, parts: Sequence["InputStats"]) -> "InputStats":
        """Of several taps that the same tokens go through, summed token by token."""
        return reduce(lambda a, b: cls(a.tokens, a.gram + b.gram, a.abs_sum + b.abs_sum), parts)


def add_gram(gram: Tensor, rows: Tensor) -> None:
    """Adds Σ x xᵀ of token vectors (tokens, in) to a sum (in, in).

    Wide ones are added in strips of rows from the diagonal rightwards, which is little more than
    half the work: what lies below the diagonal's blocks stays zero until :func:`symmetric`.
    """
    width = len(gram)
    if width < STRIPS_FROM:
        gram += rows.T @ rows
        return
    for start in range(0, width, STRIP):
        strip = rows[:, start : start + STRIP]
        gram[start : start + STRIP, start:] += strip.T @ rows[:, start:]


def symmetric(gram: Tensor) -> Tensor:
    """The whole of a sum made by :func:`add_gram`, exactly symmetric."""
    if len(gram) < STRIPS_FROM:
        return (gram + gram.T) / 2
    upper = gram.triu()
    return upper + upper.triu(1).T


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
        _require_finite(inputs, first_sample)
        rows = inputs.reshape(-1, inputs.shape[-1]).to(self.products)  # (tokens, in)
        self.tokens += rows.shape[0]
        add_gram(self.gram, rows)
        self.abs_sum += rows.abs().sum(dim=0)

    def finish(self) -> InputStats:
        """The statistics so far, with the Gram made exactly symmetric."""
        return InputStats(self.tokens, symmetric(self.gram), self.abs_sum)


@dataclass(frozen=True)
class PrefixStats:
    """Statistics of one tap behind compressed layers.

    Attributes:
        tokens: Number of token vectors behind them (of averaged ones, where they are averaged).
        gram: Σ x xᵀ of the compressed model's inputs, float64 (in, in), symmetric.
        cross: Σ x_dense xᵀ, float64 (in, in): rows belong to the dense model's inputs.
    """

    tokens: int
    gram: Tensor
    cross: Tensor

    @property
    def moment(self) -> Tensor:
        """E[x xᵀ] of the compressed model's inputs, float64 (in, in)."""
        return self.gram / self.tokens

    @property
    def cross_moment(self) -> Tensor:
        """E[x_dense xᵀ], float64 (in, in)."""
        return self.cross / self.tokens

    def pack(self) -> Packed:
        """What is kept of it: of the symmetric Gram only the lower triangle."""
        tensors = {"gram": pack_symmetric(self.gram), "cross": self.cross}
        return Packed(tensors, {"tokens": self.tokens})

    @classmethod
    def unpack(cls, record: Record) -> "PrefixStats":
        """The statistics that :meth:`pack` kept."""
        cross = record.tensor("cross")
        gram = unpack_symmetric(record.tensor("gram"), len(cross))
        return cls(int(record.attrs["tokens"]), gram, cross)


class PrefixAccumulator:
    """Streams pairs of inputs, of the dense and of the compressed model, into PrefixStats.

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
        self.cross = torch.zeros_like(self.gram)

    def add(self, dense: Tensor, inputs: Tensor, first_sample: int = 0) -> None:
        """Adds one batch.

        Args:
            dense: (samples, ..., in), what the dense model's layer reads.
            inputs: (samples, ..., in), what the same layer reads behind compressed ones.
            first_sample: Index of the batch's first sample.

        Raises:
            NumericsError: A value is not finite.
        """
        _require_finite(dense, first_sample)
        _require_finite(inputs, first_sample)
        rows = inputs.reshape(-1, inputs.shape[-1]).to(self.products)
        of_dense = dense.reshape(-1, dense.shape[-1]).to(self.products)
        self.tokens += rows.shape[0]
        add_gram(self.gram, rows)
        self.cross += of_dense.T @ rows

    def finish(self) -> PrefixStats:
        """The statistics so far, with the Gram made exactly symmetric."""
        return PrefixStats(self.tokens, symmetric(self.gram), self.cross)


class StackOfBatch:
    """AdaSVD's stack-of-batch calibration (arXiv 2502.01403, section 3.3).

    Samples are shuffled into buckets and the inputs of a bucket are averaged, token position by
    token position; the statistics are those of the averages. This raises the weight of the mean
    input against its covariance by the size of a bucket.

    Args:
        features: Width of the input.
        bucket_of: Bucket of every sample.
        device: Where the sums live.
    """

    def __init__(
        self, features: int, bucket_of: Sequence[int], device: torch.device | str = "cpu"
    ) -> None:
        self.features = features
        self.bucket_of = list(bucket_of)
        self.device = device
        self.sums: Tensor | None = None  # (2, buckets, length, in): dense, compressed

    def add(self, dense: Tensor, inputs: Tensor, first_sample: int = 0) -> None:
        """Adds one batch; arguments and errors as of :meth:`PrefixAccumulator.add`."""
        _require_finite(dense, first_sample)
        _require_finite(inputs, first_sample)
        both = torch.stack([dense, inputs]).to(torch.float64)
        both = both.reshape(2, inputs.shape[0], -1, self.features)
        if self.sums is None:
            shape = (2, max(self.bucket_of) + 1, *both.shape[2:])
            self.sums = torch.zeros(shape, dtype=torch.float64, device=self.device)
        for sample in range(both.shape[1]):
            self.sums[:, self.bucket_of[first_sample + sample]] += both[:, sample]

    def finish(self) -> PrefixStats:
        """Statistics of the buckets' means."""
        assert self.sums is not None
        sizes = torch.bincount(torch.tensor(self.bucket_of)).to(self.sums)
        means = self.sums / sizes[None, :, None, None]
        accumulator = PrefixAccumulator(self.features, self.device)
        accumulator.add(means[0], means[1])
        return accumulator.finish()


def buckets_of(samples: int, buckets: int, seed: int) -> list[int]:
    """A bucket for each of ``samples`` shuffled samples, ceil(samples / buckets) in each."""
    size = -(-samples // min(buckets, samples))
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    found = [0] * samples
    for position, sample in enumerate(order.tolist()):
        found[sample] = position // size
    return found


class CosineAccumulator:
    """Mean cosine between what enters a block and what leaves it, over all tokens."""

    def __init__(self) -> None:
        self.tokens = 0
        self.total = 0.0

    def add(self, before: Tensor, after: Tensor) -> None:
        """Adds one batch of hidden states, each (samples, length, hidden)."""
        cosine = torch.cosine_similarity(before.to(torch.float64), after.to(torch.float64), dim=-1)
        self.tokens += cosine.numel()
        self.total += float(cosine.sum())

    def finish(self) -> float:
        """The mean so far, in [-1, 1]."""
        return self.total / self.tokens


def _require_finite(inputs: Tensor, first_sample: int) -> None:
    bad = first_bad(inputs)
    if bad is not None:
        raise NumericsError(f"input is not finite at calibration sample {first_sample + bad}")
