"""Duo-SVD's column preserving (arXiv 2510.19385): ranks traded for columns kept as they are.

Giving up Δ of r ranks frees room for c = Δ (m + n) / (m + i − (r − Δ)) columns of an (m, n) weight
at equal storage, (r − Δ)(m + n − c) + c (m + i) = r (m + n), with i what a column's index takes.
Kept columns are exact, so the error is that of the rest, best approximated in its own H.
"""

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from compress_core.decompose import LowRank, energies, project, split_inputs
from compress_core.errors import ConfigError
from compress_core.fit import DENSE, Moments, Start, start_factors
from compress_core.forms.columns import index_dtype
from compress_core.forms.names import FULL, GROUP, PLAIN
from compress_core.forms.products import kept_cost, rank_cost
from compress_core.metric import SecondMoment
from compress_core.refine.inverse import inverse

GOLDEN = (math.sqrt(5) - 1) / 2
KEPT_FLOOR = 1e-10

Search = Literal["golden", "grid"]


def index_cost(features: int) -> int:
    """Numbers that one column's index counts for."""
    return index_dtype(features).itemsize // 2


@dataclass(frozen=True)
class _Trial:
    """The layer with Δ ranks traded: what is kept, and the weight and H of the rest."""

    rank: int
    kept: Tensor
    rest: Tensor
    weight: Tensor
    metric: SecondMoment
    regression: Tensor | None  # of the rest's inputs on the kept ones, where columns are re-fitted

    def error(self) -> float:
        """Root of the squared output error that the best factors leave."""
        left = energies(self.weight, self.metric)[self.rank :]
        return math.sqrt(float(left.sum()))


@dataclass(frozen=True)
class PreserveColumns:
    """Trades ranks for kept columns where that lowers the output error.

    The paper counts no indices; here each counts as a number, and c is floored, so the budget
    holds. Of all Δ that the search tries the best is taken, where the published code takes the
    better of the last two. At least one component stays.

    Attributes:
        refit: Instead of keeping columns as they were, fits them to what the factors get wrong:
            the factors then only have to approximate what the kept inputs cannot explain,
            H_ss − H_sc H_cc⁺ H_cs, and the columns become W_c + (W_s − u v) H_sc H_cc⁺. Columns
            are then chosen by the error of the ranks that really stay.
        search: "golden" as in the paper, which takes the error to have one minimum in Δ; "grid"
            tries Δ all over its range first.
        form: In which the factors will be stored, a key of ``FORMS``: what a rank frees.
        bits: Of every number that will be stored, which counts there, too; ``FULL`` for no codes.
        group: Codes of fewer bits than 16 that share a scale.
        accept: Least relative gain in error for which columns are kept at all.
    """

    refit: bool = False
    search: Search = "golden"
    accept: float = 0.01
    form: str = PLAIN
    bits: int = FULL
    group: int = GROUP
    reads: ClassVar[frozenset[str]] = frozenset({DENSE})

    def __post_init__(self) -> None:
        if not 0 <= self.accept < 1:
            raise ConfigError(
                f"accept, a relative gain in error, is in [0, 1); got {self.accept:g}"
            )

    def fit(self, weight: Tensor, start: Start, moments: Moments) -> LowRank:
        """The trade with the least error, or ``factors`` where none is worth it."""
        factors = start_factors(start)
        assert moments.dense is not None
        gram = moments.dense
        rank = factors.rank
        chosen = _worth(weight, factors, rank, gram)

        def trial(given: int) -> _Trial | None:
            order = _worth(weight, factors, rank - given, gram) if self.refit else chosen
            left = rank - given
            count = self._freed(rank, left, weight.shape[0], weight.shape[1])
            if left < 1 or left > weight.shape[1] - count:
                return None
            return _trial(weight, gram, order[:count], left, self.refit)

        errors: dict[int, float] = {}

        def error(given: int) -> float:
            if given not in errors:
                found = trial(given)
                errors[given] = math.inf if found is None else found.error()
            return errors[given]

        (_grid if self.search == "grid" else _golden)(error, rank)
        best = min(errors, key=lambda given: (errors[given], given))
        if errors[0] - errors[best] <= self.accept * errors[0]:
            return factors
        accepted = trial(best)
        assert accepted is not None
        return _fit(weight, accepted)

    def _freed(self, rank: int, left: int, out: int, inputs: int) -> int:
        """Columns that fit in place of the ranks that are given up."""
        if self.bits == FULL:
            room = rank_cost(self.form, rank, out, inputs) - rank_cost(self.form, left, out, inputs)
            return room // (out + index_cost(inputs) - left)
        most = rank_cost(self.form, rank, out, inputs, 0, self.bits, self.group)

        def price(columns: int) -> int:
            return kept_cost(self.form, left, columns, out, inputs, self.bits, self.group)

        count = bisect_right(range(inputs), most, key=price) - 1
        while price(count) > most:  # a group less of every component makes some columns cheaper
            count -= 1
        return count


def _worth(weight: Tensor, factors: LowRank, rank: int, gram: Tensor) -> Tensor:
    """Inputs by what keeping their column is worth, ‖E_:j‖² H_jj, best first."""
    error = weight - factors.u[:, :rank] @ factors.v[:rank]
    worth = error.square().sum(dim=0) * gram.diagonal()
    return worth.argsort(descending=True, stable=True)


def _trial(weight: Tensor, gram: Tensor, columns: Tensor, left: int, refit: bool) -> _Trial:
    """So many ranks left, and columns kept in place of the others."""
    rest, kept = split_inputs(weight.shape[1], columns)
    metric, regression = gram[rest][:, rest], None
    if refit and len(columns):
        mixed = gram[rest][:, kept]
        regression = mixed @ inverse(gram[kept][:, kept], KEPT_FLOOR)
        metric = metric - regression @ mixed.T
        metric = (metric + metric.T) / 2
    return _Trial(left, kept, rest, weight[:, rest], SecondMoment(metric), regression)


def _fit(weight: Tensor, trial: _Trial) -> LowRank:
    u, v, _ = project(trial.weight, trial.metric, trial.rank)
    columns = weight[:, trial.kept]
    if trial.regression is not None:
        columns = columns + (trial.weight - u @ v) @ trial.regression
    return LowRank(u, v, columns, trial.kept)


def _golden(error: Callable[[int], float], rank: int) -> None:
    """Golden-section search over Δ in [0, rank), after two cheap probes: one must beat Δ = 0."""
    low, high = 0, rank - 1
    without = error(0)
    parts = (1 - GOLDEN, GOLDEN * (1 - GOLDEN) ** 2)
    probes = [min(high, max(1, round(part * rank))) for part in parts]  # Δ = 0 would probe nothing
    if min(error(probe) for probe in probes) >= without:  # both count as tried
        return
    _narrow(error, low, high)


def _grid(error: Callable[[int], float], rank: int, points: int = 16) -> None:
    """Δ at ``points`` places, closer together near 0, then golden section around the best."""
    places = sorted({round((rank - 1) * (i / (points - 1)) ** 1.5) for i in range(points)})
    best = min(range(len(places)), key=lambda i: error(places[i]))
    _narrow(error, places[max(0, best - 1)], places[min(len(places) - 1, best + 1)])


def _narrow(error: Callable[[int], float], low: int, high: int) -> None:
    while high - low >= 3:
        left = round(high - GOLDEN * (high - low))
        right = max(left + 1, round(low + GOLDEN * (high - low)))
        if error(left) < error(right):
            high = right
        else:
            low = left
