"""Truncation that is optimal in a metric, without whitening by Cholesky and without an inverse.

For W (out, in) and metric H, the best rank-k W′ under ‖(W − W′) H^½‖ projects the outputs:
M = W H Wᵀ = Q Λ Qᵀ (descending), W′ = Q_k Q_kᵀ W, and dropping component i costs exactly λ_i.
When out > in, W = P R first (Householder QR) and the smaller R H Rᵀ is decomposed instead, with
Q = P × its eigenvectors. Any smaller budget is a prefix: u = Q_k, v = Q_kᵀ W.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from compress_core.errors import NumericsError
from compress_core.types import Share
from compress_core.whiten import Metric

ReadRows = Callable[[str, int], Tensor]  # (array name, first rows) -> tensor


@dataclass(frozen=True)
class Prepared:
    """A layer decomposed once for every budget.

    Attributes:
        arrays: What :meth:`Decomposer.realise` will read, components in rows, best first.
        loss: float64 (ranks + 1,); ``loss[r]`` is the squared error left when r components stay.
    """

    arrays: Mapping[str, Tensor]
    loss: Tensor


@dataclass(frozen=True)
class LowRank:
    """W′ = u v, with u (out, rank) and v (rank, in)."""

    u: Tensor
    v: Tensor


class Decomposer(Protocol):
    """Does everything that does not depend on the budget, then cuts to any budget."""

    def prepare(self, weight: Tensor, metric: Metric, rank: int) -> Prepared:
        """Decomposes ``weight`` (out, in), keeping at most ``rank`` components."""
        ...

    def realise(self, read: ReadRows, share: Share) -> LowRank:
        """The factors at ``share``, reading no more rows than it needs."""
        ...


@dataclass(frozen=True)
class ProjectOutputs:
    """The metric-optimal truncation above; what it stores is float32, what it computes float64."""

    def prepare(self, weight: Tensor, metric: Metric, rank: int) -> Prepared:
        """Decomposes ``weight`` (out, in) into ``ut`` (rank, out) and ``v`` (rank, in).

        Raises:
            NumericsError: The weight or its output Gram is not finite.
        """
        w = weight.to(torch.float64)
        if not torch.isfinite(w).all():
            raise NumericsError(f"weight {tuple(w.shape)} is not finite")
        directions, energy = _output_directions(w, metric, rank)  # (out, rank), (min(out, in),)
        dropped = energy.flip(0).cumsum(0).flip(0)
        loss = torch.cat([dropped, dropped.new_zeros(1)])[: rank + 1]
        arrays = {
            "ut": directions.T.to(torch.float32).contiguous(),
            "v": (directions.T @ w).to(torch.float32).contiguous(),
        }
        return Prepared(arrays, loss)

    def realise(self, read: ReadRows, share: Share) -> LowRank:
        """The first ``share.rank`` components."""
        assert share.rank is not None
        return LowRank(read("ut", share.rank).T.contiguous(), read("v", share.rank))


def _output_directions(w: Tensor, metric: Metric, rank: int) -> tuple[Tensor, Tensor]:
    """The ``rank`` best orthonormal output directions, and the energy along each direction.

    Returns:
        (out, rank) float64 with orthonormal columns, and (min(out, in),) float64, descending.
    """
    out_features, in_features = w.shape
    if out_features <= in_features:
        vectors, energy = _eigen_descending(metric.output_gram(w))
        return vectors[:, :rank], energy
    reflectors, scales = torch.geqrf(w)
    vectors, energy = _eigen_descending(metric.output_gram(reflectors[:in_features].triu()))
    padded = w.new_zeros(out_features, rank)
    padded[:in_features] = vectors[:, :rank]
    return torch.ormqr(reflectors, scales, padded), energy


def _eigen_descending(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors in columns and eigenvalues, largest first; rounding below zero is cut off."""
    if not torch.isfinite(gram).all():
        raise NumericsError(f"output Gram {tuple(gram.shape)} is not finite")
    values, vectors = torch.linalg.eigh(gram)
    return vectors.flip(1), values.flip(0).clamp_min(0.0)
