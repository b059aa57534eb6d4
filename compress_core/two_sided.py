"""A metric with two sides, ‖G^½ (W − W′) H^½‖: errors of outputs count by what they cost the model.

H is of a layer's inputs, as everywhere; G is the Fisher information of its outputs, damped, so that
it is positive definite (KFAC-SVD; OBD-LLM, arXiv 2604.00821). With Aᵀ A = G the best weight is
W′ = A⁻¹ · best(A W): whatever finds the best one in the metric of the inputs is handed A W in place
of W, and what it makes is multiplied by A⁻¹. For the truncation that is A⁻¹ U_r Σ_r V_rᵀ S⁻¹ with
U Σ Vᵀ = svd(A W S), S = H^½. It is the same for every such A, G^½ among them: a turn of A W turns U
with it. A Cholesky factor takes a tenth of the time of a root.

The squared error is tr(G E H Eᵀ), E = W − W′: twice the KL divergence that `curvature` predicts at
the same damping, in nats per token where H is E[x xᵀ], and on one scale for all layers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from compress_core.curvature import OutputFisher
from compress_core.decompose import LowRank, Prepared, ProjectOutputs
from compress_core.errors import ConfigError, NumericsError
from compress_core.fit import Fitter, Moments, Start, start_factors
from compress_core.metric import Metric
from compress_core.sparse import Sparse
from compress_core.types import Share

ROUNDING = torch.finfo(torch.float32).eps  # of the largest eigenvalue: G is kept in float32


@dataclass(frozen=True)
class TwoSided:
    """How errors of outputs count, beside the metric of the inputs.

    Attributes:
        damp: Part of G's mean diagonal that is added to its diagonal, above 0. Little trusts the
            gradients, much approaches the metric of the inputs alone.
    """

    damp: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.damp < math.inf:
            raise ConfigError(f"metric_damp must be above 0, got {self.damp:g}")

    def root(self, fisher: OutputFisher, device: torch.device | str = "cpu") -> "Root":
        """A of one layer.

        Raises:
            NumericsError: G is zero, or singular to rounding in spite of its damping.
        """
        moment = self._damped(fisher, device)
        # No eigenvalue is above the largest sum of a row, so that this mostly says all there is to.
        clear = moment.clone()
        clear.diagonal().sub_(ROUNDING * float(moment.abs().sum(dim=1).max()))
        if int(torch.linalg.cholesky_ex(clear).info):
            self._check(moment)
        return Root(torch.linalg.cholesky(moment))

    def _check(self, moment: Tensor) -> None:
        values = torch.linalg.eigvalsh(moment)
        least, largest = float(values[0]), float(values[-1])
        if not least > ROUNDING * largest:
            raise NumericsError(
                f"the Fisher information of its outputs has eigenvalues from {least:.3g} to "
                f"{largest:.3g}, which is singular to rounding: give more than "
                f"metric_damp={self.damp:g}"
            )

    def lengths(self, fisher: OutputFisher, device: torch.device | str = "cpu") -> Tensor:
        """Those of A's columns, √G_ii: float64 (out,), with no factor taken.

        Raises:
            NumericsError: G is zero.
        """
        return self._damped(fisher, device).diagonal().sqrt()

    def _damped(self, fisher: OutputFisher, device: torch.device | str) -> Tensor:
        moment = fisher.damped(self.damp).to(device)
        if not float(moment.diagonal().max()) > 0:
            raise NumericsError(
                "none of its outputs has a gradient, so their errors cannot be weighed: leave out "
                "metric=two_sided"
            )
        return moment


@dataclass(frozen=True)
class Root:
    """A = Lᵀ of a layer's outputs, with G = L Lᵀ.

    Attributes:
        lower: L, float64 (out, out), lower triangular.
    """

    lower: Tensor

    def scale(self, rows: Tensor) -> Tensor:
        """A times something with a row per output, in float64."""
        return self.lower.T @ rows.to(self.lower)

    def back(self, rows: Tensor) -> Tensor:
        """A⁻¹ times it."""
        return torch.linalg.solve_triangular(self.lower.T, rows.to(self.lower), upper=True)

    def unscale(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """A⁻¹ u and v, :func:`balanced`; float64."""
        return balanced(self.back(u), v.to(self.lower))


def balanced(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The same product, component by component, with columns of u of length 1.

    A has the scale of gradients, which float16 may not hold.
    """
    lengths = torch.linalg.vector_norm(u, dim=0)
    lengths = torch.where(lengths > 0, lengths, 1.0)
    return u / lengths, v * lengths[:, None]


MakeRoot = Callable[[], Root]  # made where it is needed: it takes a factorisation


@dataclass(frozen=True)
class ProjectTwoSided(ProjectOutputs):
    """The truncation that is optimal in a metric of inputs and outputs.

    What it stores is read as any decomposition. ``ut`` has rows of length 1 that are not
    orthogonal; ``loss`` is the squared error in the metric, twice the predicted divergence.

    Attributes:
        root: Makes the A of the layer.
    """

    root: MakeRoot = field(kw_only=True)

    def prepare(self, weight: Tensor, metric: Metric, rank: int) -> Prepared:
        """Decomposes A W and takes its components back.

        Raises:
            NumericsError: As :meth:`TwoSided.root`; the weight or its output Gram is not finite.
        """
        root = self.root()
        scaled = ProjectOutputs.prepare(self, root.scale(weight), metric, rank)
        u, v = root.unscale(scaled.arrays["ut"].T, scaled.arrays["v"])
        arrays = {
            "ut": u.T.to(torch.float32).contiguous(),
            "v": v.to(torch.float32).contiguous(),
        }
        return replace(scaled, arrays=arrays)


@dataclass(frozen=True)
class FitTwoSided:
    """A refiner in a metric of inputs and outputs; a pruner in that of which G has its diagonal.

    Entries that stay do so in the weight and not in A W, so that of A no more than the scale of
    each row goes with them: which entries of which row stay is weighed by it. Columns that stay
    are columns of both.

    Attributes:
        inner: The refiner in the metric of the inputs. It only multiplies by the weight, by its
            factors and by moments, and keeps columns; nothing else goes with A. Or the pruner.
        root: Makes the A of the layer.
        lengths: Makes those of its columns, (out,), all that a pruner needs of it.
    """

    inner: Fitter
    root: MakeRoot
    lengths: Callable[[], Tensor]
    reads: ClassVar[frozenset[str]] = frozenset()  # itself; a method's own refiner is asked

    def fit(self, weight: Tensor, start: Start, moments: Moments) -> LowRank:
        """Fits A W and takes the factors back; columns that are kept as they are stay so."""
        if isinstance(start, Share):
            if start.columns:
                return self._of_columns(weight, start, moments, self.root())
            return self._pruned(weight, start, moments, self.lengths())
        root = self.root()
        scaled, factors = root.scale(weight), start_factors(start)
        begin = LowRank(*balanced(root.scale(factors.u), factors.v))
        found = self.inner.fit(scaled, begin, moments)
        u, v = root.unscale(found.u, found.v)
        if found.columns is None or found.index is None:
            return LowRank(u, v)
        change = found.columns - scaled[:, found.index]
        columns = weight[:, found.index] + root.back(change)
        return LowRank(u, v, columns, found.index)

    def _of_columns(self, weight: Tensor, share: Share, moments: Moments, root: Root) -> LowRank:
        """Chooses columns of A W, fits them and takes that back."""
        found = self.inner.fit(root.scale(weight), share, moments)
        assert found.columns is not None and found.rank == 0
        return replace(found, columns=root.back(found.columns))

    def _pruned(self, weight: Tensor, share: Share, moments: Moments, scale: Tensor) -> LowRank:
        """Prunes √G_ii times each row, ``scale`` (out,), and takes that back."""
        found = self.inner.fit(scale[:, None] * weight, share, moments)
        assert found.sparse is not None and found.rank == 0
        mask = found.sparse.mask
        back = scale.reciprocal()[:, None].expand(mask.shape)[mask]
        return replace(found, sparse=Sparse(mask, found.sparse.values * back))
