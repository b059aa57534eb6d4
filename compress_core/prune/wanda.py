"""Wanda's rule (arXiv 2306.11695): an entry is worth |W_ij| ‖x_j‖, compared within its row."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from compress_core.decompose import LowRank
from compress_core.errors import NumericsError
from compress_core.finite import all_finite
from compress_core.fit import PREFIX, Moments, Start, start_share
from compress_core.prune.select import UNSTRUCTURED, read_pattern, select_rows
from compress_core.sparse import Sparse


@dataclass(frozen=True)
class Wanda:
    """Keeps the best entries of each row as they are.

    Attributes:
        pattern: "unstructured", or N:M.
    """

    pattern: str = UNSTRUCTURED
    reads: ClassVar[frozenset[str]] = frozenset({PREFIX})

    def __post_init__(self) -> None:
        read_pattern(self.pattern)

    def fit(self, weight: Tensor, start: Start, moments: Moments) -> LowRank:
        """The best ``share.nonzeros`` entries; nothing else."""
        share = start_share(start)
        scores = weight.abs() * input_scale(moments)
        mask = select_rows(scores, share.nonzeros, read_pattern(self.pattern))
        return without_factors(Sparse.of(weight, mask))


def second_moment(moments: Moments) -> Tensor:
    """E[x xᵀ] (in, in) behind the compressed layers.

    Raises:
        NumericsError: It is not finite or has a negative diagonal.
    """
    gram = moments.prefix
    assert gram is not None
    if not all_finite(gram) or bool((gram.diagonal() < 0).any()):
        raise NumericsError(
            f"the second moment {tuple(gram.shape)} of the inputs is not finite or has a "
            "negative diagonal"
        )
    return gram


def input_scale(moments: Moments) -> Tensor:
    """The root mean square of each input, (in,), which ranks as ‖x_j‖ does.

    Raises:
        NumericsError: The second moment cannot be one.
    """
    return second_moment(moments).diagonal().sqrt()


def without_factors(sparse: Sparse) -> LowRank:
    """A layer of sparse entries alone: factors of rank 0."""
    rows, columns = sparse.mask.shape
    values = sparse.values
    return LowRank(values.new_zeros(rows, 0), values.new_zeros(0, columns), sparse=sparse)
