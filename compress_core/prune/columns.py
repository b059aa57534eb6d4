"""Whole columns by optimal brain surgery: which inputs a layer goes on reading, fitted anew.

With K = H⁻¹, H the second moment of the inputs that are left, taking column w_j out costs
w_jᵀ G w_j / K_jj where the others make up for it, w_k −= w_j K_jk / K_jj (the structured rule of
optimal brain surgery; ZipLM, arXiv 2302.04089); the inverse of what is then left is
K − K_:j K_j: / K_jj. So what stays is at every step the best weight on its inputs,
W_C + W_R H_RC H_CC⁻¹: G, what errors of outputs weigh, decides which columns go and nothing else.

Columns go in blocks, so that all but the choice is products of matrices. The columns of a block
are chosen one by one, each with what those before it leave of a small part of K and of Wᵀ G W: of
two inputs that say the same one goes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compress_core.coding.expected_entries import level_counts
from compress_core.decompose import LowRank
from compress_core.fit import DENSE, PREFIX, Moments, Start, start_share
from compress_core.prune.fitted import outputs_between
from compress_core.prune.obs import check_surgery, damped, upper_factor
from compress_core.prune.wanda import second_moment
from compress_core.refine.masked import check_part

BLOCK = 128  # columns that go at once, at most
LOOKED_AT = 64  # columns of least cost that a block is chosen from, at least; else twice as many


@dataclass(frozen=True)
class Reduced:
    """What is left of a layer.

    Attributes:
        index: The inputs that stay, (c,), ascending.
        weight: The best weight on them, (out, c).
        weighed: G times that.
        inverse: [H_CC]⁻¹, (c, c).
        lost: tr(G E H Eᵀ), E what the dense weight has and this has not.
    """

    index: Tensor
    weight: Tensor
    weighed: Tensor
    inverse: Tensor
    lost: float


def inverse_of(triangle: Tensor) -> Tensor:
    """H⁻¹ (in, in) of H = R Rᵀ, with R upper triangular as :func:`upper_factor` makes it."""
    return torch.cholesky_inverse(triangle.flip(0, 1)).flip(0, 1)


def eliminate(
    weight: Tensor, weighed: Tensor, inverse: Tensor, counts: Sequence[int], block: int = BLOCK
) -> Iterator[Reduced]:
    """Takes columns out of a weight, those first that cost least, and gives what is left.

    Args:
        weight: W, float64 (out, in).
        weighed: G W; W itself where all outputs count alike.
        inverse: H⁻¹ (in, in).
        counts: Columns that stay when something is given, falling, 1 or more each.
        block: Columns that go at once, at most.
    """
    index, lost = torch.arange(weight.shape[1], device=weight.device), 0.0
    for count in counts:
        while (many := min(block, len(index) - count)) > 0:
            gone, cost = _cheapest(weight, weighed, inverse, many)
            stays = torch.ones(len(index), dtype=torch.bool, device=index.device)
            stays[gone] = False
            between = inverse[gone][:, stays]
            passed = torch.linalg.solve(inverse[gone][:, gone], between)
            weight = weight[:, stays].addmm_(weight[:, gone], passed, alpha=-1)
            weighed = weighed[:, stays].addmm_(weighed[:, gone], passed, alpha=-1)
            inverse = inverse[stays][:, stays].addmm_(between.T, passed, alpha=-1)
            index, lost = index[stays], lost + cost
        yield Reduced(index, weight, weighed, inverse, lost)


def _cheapest(weight: Tensor, weighed: Tensor, inverse: Tensor, count: int) -> tuple[Tensor, float]:
    """Places of ``count`` columns that cost little when they go one after another, and what."""
    costs = (weight * weighed).sum(dim=0) / inverse.diagonal()
    looked_at = costs.argsort(stable=True)[: max(LOOKED_AT, 2 * count)]
    own, k = weight[:, looked_at].T @ weighed[:, looked_at], inverse[looked_at][:, looked_at]
    gone = torch.zeros(len(looked_at), dtype=torch.bool, device=weight.device)
    order, lost = [], 0.0
    for _ in range(count):
        left = (own.diagonal() / k.diagonal()).masked_fill(gone, torch.inf)
        place = int(left.argmin())
        gone[place] = True
        order.append(place)
        lost += max(0.0, float(left[place]))
        # W − w_j K_j: / K_jj makes this of Wᵀ G W.
        passed = k[place] / k[place, place]
        half = own[place] - passed * (own[place, place] / 2)
        own.addr_(half, passed, alpha=-1).addr_(passed, half, alpha=-1)
        k.addr_(k[place].clone(), passed, alpha=-1)
    return looked_at[torch.tensor(order, device=looked_at.device)], lost


@dataclass(frozen=True)
class FitColumns:
    """On the dense model's inputs.

    Attributes:
        damping: Part of the mean of the second moment's diagonal that is added to it.
    """

    damping: float = 0.01
    reads: ClassVar[frozenset[str]] = frozenset({DENSE})

    def __post_init__(self) -> None:
        check_surgery(self.damping, BLOCK)

    def fit(self, weight: Tensor, start: Start, moments: Moments) -> LowRank:
        """``share.columns`` columns towards the weight's own outputs."""
        gram = second_moment(Moments(prefix=moments.dense))
        return self.solve(weight, start_share(start).columns, gram, weight @ gram)

    def solve(self, weight: Tensor, count: int, gram: Tensor, target: Tensor) -> LowRank:
        """The fit itself.

        Args:
            weight: Dense, float64 (out, in).
            count: Columns that stay.
            gram: E[x xᵀ] (in, in).
            target: E[y xᵀ] (out, in), y what the layer should give.

        Raises:
            NumericsError: The second moment is not positive definite in spite of its damping.
        """
        h = damped(gram, self.damping)
        inverse = inverse_of(upper_factor(h, self.damping))
        # What is added to the second moment pulls to the dense weight.
        target = target + weight @ (h - gram)
        ideal = (target @ inverse) * (gram.diagonal() > 0)
        # On the way as the levels that are predicted, so that the same columns stay.
        above = [n for n in reversed(level_counts(len(gram))) if n > count]
        *_, found = eliminate(ideal, ideal, inverse, [*above, count])
        u, v = weight.new_zeros(len(weight), 0), weight.new_zeros(0, len(gram) - count)
        return LowRank(u, v, found.weight, found.index)


@dataclass(frozen=True)
class PrefixFitColumns:
    """The same behind layers that are compressed already, whose errors it partly makes up for.

    Attributes:
        toward_dense: β, the dense model's part in the outputs it is fitted to, in [0, 1].
        damping: As of :class:`FitColumns`.
    """

    toward_dense: float = 0.5
    damping: float = 0.01
    reads: ClassVar[frozenset[str]] = frozenset({PREFIX})

    def __post_init__(self) -> None:
        FitColumns(self.damping)  # it checks
        check_part(self.toward_dense)

    def fit(self, weight: Tensor, start: Start, moments: Moments) -> LowRank:
        """``share.columns`` columns towards outputs between its own and the dense model's."""
        gram, target = outputs_between(weight, moments, self.toward_dense)
        share = start_share(start)
        return FitColumns(self.damping).solve(weight, share.columns, gram, target)
