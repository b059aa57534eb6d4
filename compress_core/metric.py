"""In which metric the error of a layer is measured: ‖(W − W′) A‖² with A A = H.

H = I is plain SVD, H = D² is activation scaling (ASVD), H = E[x xᵀ] is the output error itself
(SVD-LLM). No root, no Cholesky factor and no inverse of H is ever formed: a metric only has to give
R H Rᵀ for some rows R.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from compress_core.errors import ConfigError, NumericsError
from compress_core.finite import all_finite
from compress_core.record import Packed, Record
from compress_core.stats import InputStats


class Metric(Protocol):
    """A positive semidefinite H over the inputs of a layer."""

    def output_gram(self, rows: Tensor) -> Tensor:
        """R H Rᵀ: float64 (r, r), symmetric, for ``rows`` R of shape (r, in) in float64."""
        ...

    def to(self, device: torch.device | str) -> "Metric":
        """The same metric on ``device``."""
        ...

    def pack(self) -> Packed:
        """What is kept of it between stages."""
        ...

    @classmethod
    def unpack(cls, record: Record, gram: InputStats | None) -> "Metric":
        """The metric that :meth:`pack` kept.

        Args:
            record: What was kept.
            gram: The statistics it was made of, where the weighting ``keeps_gram``.
        """
        ...


@dataclass(frozen=True)
class Plain:
    """H = I: every input direction counts the same."""

    def pack(self) -> Packed:
        """Nothing."""
        return Packed()

    @classmethod
    def unpack(cls, record: Record, gram: InputStats | None) -> "Plain":
        """Itself."""
        return cls()

    def output_gram(self, rows: Tensor) -> Tensor:
        """R Rᵀ."""
        return rows @ rows.T

    def to(self, device: torch.device | str) -> "Plain":
        """Itself: it holds nothing."""
        return self


@dataclass(frozen=True)
class Diagonal:
    """H = D²: each input channel counts by its scale ``d`` (in,), float64, positive."""

    d: Tensor

    def pack(self) -> Packed:
        """The scales."""
        return Packed({"d": self.d})

    @classmethod
    def unpack(cls, record: Record, gram: InputStats | None) -> "Diagonal":
        """The scales that were kept."""
        return cls(record.tensor("d"))

    def output_gram(self, rows: Tensor) -> Tensor:
        """R D² Rᵀ."""
        scaled = rows * self.d
        return scaled @ scaled.T

    def to(self, device: torch.device | str) -> "Diagonal":
        """The same metric on ``device``."""
        return Diagonal(self.d.to(device))


@dataclass(frozen=True)
class SecondMoment:
    """H = E[x xᵀ]: error is the mean squared output error per token; ``h`` (in, in), float64."""

    h: Tensor

    def pack(self) -> Packed:
        """A description only: the Gram itself is kept already, where it was measured."""
        diagonal = self.h.diagonal()
        dead = int((diagonal == 0).sum())
        return Packed({}, {"mean square": float(diagonal.mean()), "dead channels": dead})

    @classmethod
    def unpack(cls, record: Record, gram: InputStats | None) -> "SecondMoment":
        """The moment of the statistics that were kept."""
        assert gram is not None
        return cls(gram.moment)

    def output_gram(self, rows: Tensor) -> Tensor:
        """R H Rᵀ, made exactly symmetric."""
        gram = (rows @ self.h) @ rows.T
        return (gram + gram.T) / 2

    def to(self, device: torch.device | str) -> "SecondMoment":
        """The same metric on ``device``."""
        return SecondMoment(self.h.to(device))


METRICS: dict[str, type[Metric]] = {
    "plain": Plain,
    "diagonal": Diagonal,
    "second moment": SecondMoment,
}
"""Every metric, by the name under which it is kept."""


def pack_metric(metric: Metric) -> Packed:
    """What is kept of a metric, and of which kind it is.

    Raises:
        TypeError: A metric that is not in ``METRICS``.
    """
    for name, kind in METRICS.items():
        if type(metric) is kind:
            packed = metric.pack()
            return Packed(packed.tensors, {**packed.attrs, "metric": name})
    raise TypeError(f"metric {type(metric).__name__} is not in METRICS")


def unpack_metric(record: Record, gram: InputStats | None = None) -> Metric:
    """The metric that :func:`pack_metric` kept; ``gram`` as :meth:`Metric.unpack` takes it."""
    return METRICS[record.attrs["metric"]].unpack(record, gram)


class Weighting(Protocol):
    """Turns what was measured at a tap into a metric."""

    needs: ClassVar[frozenset[str]]  # statistics it reads: "gram", "abs_sum" or "fisher"
    keeps_gram: ClassVar[bool]  # whether its metric is the Gram itself, not something smaller

    def metric(self, stats: InputStats | Tensor | None) -> Metric:
        """The metric for layers that read this tap; for "fisher", of one layer, from (in,) sums."""
        ...


@dataclass(frozen=True)
class Unweighted:
    """No calibration: H = I."""

    needs: ClassVar[frozenset[str]] = frozenset()
    keeps_gram: ClassVar[bool] = False

    def metric(self, stats: InputStats | Tensor | None) -> Metric:
        """The plain metric, whatever was measured."""
        return Plain()


@dataclass(frozen=True)
class ActivationScale:
    """ASVD's channel scale d_j = (mean |x_j|)^alpha + epsilon (arXiv 2312.05821, section 3.2).

    Attributes:
        alpha: Exponent, 0.5 in the paper's code.
        epsilon: Added so that a dead channel keeps a positive scale.
    """

    alpha: float = 0.5
    epsilon: float = 1e-6
    needs: ClassVar[frozenset[str]] = frozenset({"abs_sum"})
    keeps_gram: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not (0 <= self.alpha < math.inf and 0 < self.epsilon < math.inf):
            raise ConfigError(
                f"asvd needs alpha >= 0 and epsilon > 0, got alpha={self.alpha:g}, "
                f"epsilon={self.epsilon:g}"
            )

    def metric(self, stats: InputStats | Tensor | None) -> Metric:
        """The diagonal metric of the measured mean magnitudes."""
        assert isinstance(stats, InputStats)
        return Diagonal((stats.abs_sum / stats.tokens) ** self.alpha + self.epsilon)


@dataclass(frozen=True)
class OutputError:
    """H = E[x xᵀ], so that truncation minimises the output error (SVD-LLM, arXiv 2403.07378)."""

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    keeps_gram: ClassVar[bool] = True

    def metric(self, stats: InputStats | Tensor | None) -> Metric:
        """The second moment per token.

        Raises:
            NumericsError: The Gram has a negative diagonal or a value that is not finite.
        """
        assert isinstance(stats, InputStats)
        diagonal = stats.gram.diagonal()
        if not all_finite(stats.gram) or bool((diagonal < 0).any()):
            raise NumericsError(
                f"the Gram matrix {tuple(stats.gram.shape)} of {stats.tokens} tokens is not finite "
                "or has a negative diagonal; the calibration statistics are damaged"
            )
        return SecondMoment(stats.moment)


@dataclass(frozen=True)
class ChannelScale:
    """d_j = E[x_j²]^½: a weight's columns count as much as what they are multiplied by.

    Attributes:
        floor: Least scale of a channel, relative to the mean scale: a dead one is never divided by
            zero, and keeps its weights where they cost nothing.
    """

    floor: float = 1e-3
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    keeps_gram: ClassVar[bool] = False

    def metric(self, stats: InputStats | Tensor | None) -> Metric:
        """The diagonal metric of the measured mean squares.

        Raises:
            NumericsError: A mean square is negative or not finite, or all are zero.
        """
        assert isinstance(stats, InputStats)
        squares = stats.gram.diagonal() / stats.tokens
        scale = squares.sqrt()
        if not all_finite(scale) or not float(scale.mean()) > 0:
            raise NumericsError("an input has no finite positive mean square to scale channels by")
        return Diagonal(scale.clamp_min(self.floor * float(scale.mean())))


@dataclass(frozen=True)
class FisherScale:
    """FWSVD's scale d_j = (Fisher information of column j)^½ + epsilon · mean (arXiv 2207.00112).

    Attributes:
        epsilon: Added so that an input without gradient keeps a positive scale, relative to the
            mean scale.
    """

    epsilon: float = 1e-6
    needs: ClassVar[frozenset[str]] = frozenset({"fisher"})
    keeps_gram: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < math.inf:
            raise ConfigError(f"fwsvd needs epsilon > 0, got {self.epsilon:g}")

    def metric(self, stats: InputStats | Tensor | None) -> Metric:
        """The diagonal metric of the Fisher information (in,) of a layer's columns.

        Raises:
            NumericsError: No column has a gradient.
        """
        assert isinstance(stats, Tensor)
        scale = stats.to(torch.float64).sqrt()
        if not float(scale.sum()) > 0:
            raise NumericsError("no weight of the layer has a gradient, so none can be weighed")
        return Diagonal(scale + self.epsilon * scale.mean())


def summed_fisher(parts: Sequence[Tensor]) -> Tensor:
    """Fisher information (in,) of a stack's columns, from its layers'."""
    return torch.stack(list(parts)).sum(dim=0)
