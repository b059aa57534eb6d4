"""Truncation that is optimal in a metric, without whitening by Cholesky and without an inverse.

For W (out, in) and metric H, the best rank-k W′ under ‖(W − W′) H^½‖ projects the outputs:
M = W H Wᵀ = Q Λ Qᵀ (descending), W′ = Q_k Q_kᵀ W, and dropping component i costs exactly λ_i.
When out > in, W = P R first (Householder QR) and the smaller R H Rᵀ is decomposed instead, with
Q = P × its eigenvectors. Any smaller budget is a prefix: u = Q_k, v = Q_kᵀ W.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from compress_core.errors import NumericsError
from compress_core.finite import all_finite
from compress_core.metric import Metric
from compress_core.sparse import Sparse
from compress_core.types import Share

ReadRows = Callable[[str, int], Tensor]  # (array name, first rows) -> tensor


@dataclass(frozen=True)
class Prepared:
    """A layer decomposed once for every budget.

    Attributes:
        arrays: What :meth:`Decomposer.realise` will read, components in rows, best first.
        loss: float64 (ranks + 1,); ``loss[r]`` is the squared error left when r components stay, in
            the metric of the decomposition.
        sparse: Entries beside the components, or None.
    """

    arrays: Mapping[str, Tensor]
    loss: Tensor
    sparse: Sparse | None = None


@dataclass(frozen=True)
class LowRank:
    """W′ = u v, and beside it columns of a weight as they are; a base and sparse entries are added.

    Attributes:
        u: (out, rank).
        v: (rank, in - kept), for the inputs that are not kept, in their order.
        columns: (out, kept), or None.
        index: (kept,) int64, ascending: which inputs the columns belong to; None without columns.
        sparse: What is added to all that, (out, in); None for nothing.
        bias: What is added to the layer's bias, (out,); None for nothing.
        base: What all that is added to, (out, in); None for nothing.
    """

    u: Tensor
    v: Tensor
    columns: Tensor | None = None
    index: Tensor | None = None
    sparse: Sparse | None = None
    bias: Tensor | None = None
    base: Tensor | None = None

    @property
    def rank(self) -> int:
        """Components."""
        return self.u.shape[1]

    @property
    def in_features(self) -> int:
        """Inputs of the layer, those of kept columns among them."""
        return self.v.shape[1] + (0 if self.index is None else len(self.index))

    def dense(self) -> Tensor:
        """W′ (out, in), in the dtype of ``u``."""
        whole = self.u @ self.v
        if self.columns is not None and self.index is not None:
            product = whole
            rest, kept = split_inputs(self.in_features, self.index)
            whole = product.new_empty(product.shape[0], len(rest) + len(kept))
            whole[:, rest] = product
            whole[:, kept] = self.columns
        whole = whole if self.base is None else self.base + whole
        return whole if self.sparse is None else whole + self.sparse.dense()


def split_inputs(features: int, index: Tensor) -> tuple[Tensor, Tensor]:
    """The inputs that are not in ``index`` and those that are, both ascending."""
    kept = torch.zeros(features, dtype=torch.bool, device=index.device)
    kept[index] = True
    return (~kept).nonzero().flatten(), kept.nonzero().flatten()


class Decomposer(Protocol):
    """Does everything that does not depend on the budget, then cuts to any budget."""

    @property
    def whole(self) -> bool:
        """Whether it is asked for all components, not only as many as pay."""
        ...

    @property
    def offers_entries(self) -> bool:
        """Whether it makes sparse entries beside the components."""
        ...

    def prepare(self, weight: Tensor, metric: Metric, rank: int) -> Prepared:
        """Decomposes ``weight`` (out, in), keeping at most ``rank`` components."""
        ...

    def realise(self, read: ReadRows, share: Share) -> LowRank:
        """The factors at ``share`` (not dense), reading no more rows than it needs."""
        ...


@dataclass(frozen=True)
class ProjectOutputs:
    """The metric-optimal truncation above; what it stores is float32, what it computes float64.

    Attributes:
        whole: Whether components are kept beyond the rank at which factors pay, for methods that
            pick among all of them.
    """

    whole: bool = False
    offers_entries: ClassVar[bool] = False

    def prepare(self, weight: Tensor, metric: Metric, rank: int) -> Prepared:
        """Decomposes ``weight`` (out, in) into ``ut`` (rank, out) and ``v`` (rank, in).

        Raises:
            NumericsError: The weight or its output Gram is not finite.
        """
        w = weight.to(torch.float64)
        if not all_finite(w):
            raise NumericsError(f"weight {tuple(w.shape)} is not finite")
        u, v, energy = project(w, metric, rank)
        dropped = energy.flip(0).cumsum(0).flip(0)
        loss = torch.cat([dropped, dropped.new_zeros(1)])[: rank + 1]
        arrays = {
            "ut": u.T.to(torch.float32).contiguous(),
            "v": v.to(torch.float32).contiguous(),
        }
        return Prepared(arrays, loss)

    def realise(self, read: ReadRows, share: Share) -> LowRank:
        """The first ``share.rank`` components."""
        assert share.rank is not None
        return LowRank(read("ut", share.rank).T.contiguous(), read("v", share.rank))


def project(w: Tensor, metric: Metric, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``rank`` best output directions, the weight along them, and the energy along each.

    Returns:
        u (out, rank) with orthonormal columns, v = uᵀ W (rank, in), and the energies
        (min(out, in),), descending; all float64.
    """
    out_features, in_features = w.shape
    if out_features <= in_features:
        vectors, energy = eigen_descending(metric.output_gram(w))
        u = vectors[:, :rank]
        return u, u.T @ w, energy
    reflectors, scales = torch.geqrf(w)
    triangle = reflectors[:in_features].triu()
    vectors, energy = eigen_descending(metric.output_gram(triangle))
    padded = w.new_zeros(out_features, rank)
    padded[:in_features] = vectors[:, :rank]
    u = torch.ormqr(reflectors, scales, padded)
    return u, vectors[:, :rank].T @ triangle, energy  # uᵀ W = (P e)ᵀ P R = eᵀ R


def energies(w: Tensor, metric: Metric) -> Tensor:
    """Energy along each output direction (min(out, in),), descending: :func:`project`'s third."""
    if w.shape[0] > w.shape[1]:
        w = torch.geqrf(w)[0][: w.shape[1]].triu()
    gram = metric.output_gram(w)
    if not all_finite(gram):
        raise NumericsError(f"output Gram {tuple(gram.shape)} is not finite")
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0.0)


def eigen_descending(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors in columns and eigenvalues, largest first; rounding below zero is cut off."""
    if not all_finite(gram):
        raise NumericsError(f"output Gram {tuple(gram.shape)} is not finite")
    values, vectors = torch.linalg.eigh(gram)
    return vectors.flip(1), values.flip(0).clamp_min(0.0)
