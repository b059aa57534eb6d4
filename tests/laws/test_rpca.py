"""Robust PCA: a planted split is found, and components and entries are always the whole weight."""

import math

import pytest
import torch
from torch import Tensor

from compress_core.errors import ConfigError, NumericsError
from compress_core.metric import ChannelScale, Diagonal, Metric, Plain, SecondMoment
from compress_core.robust_pca import SOLVED, RobustPca, Split, shrink, shrink_singular, split
from compress_core.stats import InputStats
from compress_core.types import Share


def planted(out: int, into: int, rank: int, corrupted: float, seed: int) -> tuple[Tensor, Tensor]:
    """As in section 4.1 of Candès et al. (arXiv 0912.3599): entries of ±1 at random places."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    low = normal(out, rank) @ normal(rank, into) / max(out, into)
    places = torch.rand(out, into, generator=generator) < corrupted
    return low, torch.where(places, normal(out, into).sign(), 0.0)


def weight_of(shape: tuple[int, int], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("shape", "corrupted"), [((200, 200), 0.05), ((200, 200), 0.1), ((160, 240), 0.05)]
)
def test_a_planted_split_is_recovered(shape: tuple[int, int], corrupted: float) -> None:
    low, entries = planted(*shape, rank=min(shape) // 20, corrupted=corrupted, seed=1)
    for growth in (1.0, 1.2):
        found = split(low + entries, 1.0, iterations=2000, tolerance=1e-9, growth=growth)
        assert found.residual <= 1e-9
        assert float((found.low - low).norm() / low.norm()) < 1e-6
        assert float((found.entries - entries).norm() / entries.norm()) < 1e-6
    prepared = RobustPca(2000, tolerance=1e-9).prepare(low + entries, Plain(), min(shape))
    big = prepared.arrays["v"].norm(dim=1) > 1e-5
    assert int(big.sum()) == min(shape) // 20
    assert prepared.sparse is not None
    assert prepared.sparse.dense().double() == pytest.approx(entries, abs=1e-6)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_the_default_converges_to_nearly_the_least_objective(
    shape: tuple[int, int], scale: float
) -> None:
    weight = weight_of(shape) * torch.logspace(-1, 1, shape[1], dtype=torch.float64)
    defaults = RobustPca()
    found = split(weight, scale, defaults.iterations, defaults.tolerance, defaults.growth)
    best = split(weight, scale, 3000, 1e-8)
    assert found.iterations < defaults.iterations and found.residual <= defaults.tolerance

    def objective(parts: Split) -> float:
        penalty = scale / math.sqrt(max(shape))
        return float(torch.linalg.svdvals(parts.low).sum() + penalty * parts.entries.abs().sum())

    assert objective(found) == pytest.approx(objective(best), rel=2e-3)
    solved = RobustPca(lambda_scale=scale).prepare(weight, Plain(), min(shape)).arrays[SOLVED]
    assert solved.tolist() == [found.iterations, found.residual]


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
@pytest.mark.parametrize("iterations", [1, 10])
@pytest.mark.parametrize("scaled", [False, True])
def test_components_and_entries_are_the_weight(
    shape: tuple[int, int], iterations: int, scaled: bool
) -> None:
    weight = weight_of(shape)
    d = torch.logspace(-2, 2, shape[1], dtype=torch.float64)
    metric: Metric = Diagonal(d) if scaled else Plain()
    prepared = RobustPca(iterations).prepare(weight, metric, min(shape))
    ut, v = prepared.arrays["ut"].double(), prepared.arrays["v"].double()
    assert prepared.sparse is not None and 0 < prepared.sparse.nonzeros < weight.numel()
    assert ut.T @ v + prepared.sparse.dense() == pytest.approx(weight, abs=3e-5)
    assert ut @ ut.T == pytest.approx(torch.eye(len(ut), dtype=torch.float64), abs=1e-6)
    energy = (v * (d if scaled else 1)).square().sum(1)
    assert bool((energy[:-1] >= energy[1:] * (1 - 1e-6)).all())
    assert prepared.loss[:-1] - prepared.loss[1:] == pytest.approx(energy, rel=1e-4)
    low = RobustPca().realise(lambda name, rows: prepared.arrays[name][:rows], Share(3))
    assert low.rank == 3 and low.dense().shape == shape


def test_a_second_run_gives_the_same_bits() -> None:
    weight = weight_of((40, 24))
    first, second = (RobustPca().prepare(weight, Plain(), 24) for _ in range(2))
    assert all(torch.equal(first.arrays[name], second.arrays[name]) for name in first.arrays)
    assert first.sparse is not None and second.sparse is not None
    assert torch.equal(first.sparse.values, second.sparse.values)


def test_a_smaller_penalty_leaves_more_entries() -> None:
    weight, counts = weight_of((30, 20)), []
    for scale in (0.1, 0.5, 1.0, 2.0):
        prepared = RobustPca(100, scale).prepare(weight, Plain(), 20)
        assert prepared.sparse is not None
        counts.append(prepared.sparse.nonzeros)
    assert counts == sorted(counts, reverse=True) and counts[0] > 1.5 * counts[-1]


def test_a_weight_of_zeros() -> None:
    prepared = RobustPca().prepare(torch.zeros(5, 7), Plain(), 5)
    assert prepared.sparse is not None and prepared.sparse.nonzeros == 0
    assert prepared.arrays["ut"].shape == (0, 5) and prepared.arrays["v"].shape == (0, 7)


def test_shrinkage_is_what_its_definition_says() -> None:
    matrix, by = weight_of((9, 14)), 0.4
    shrunk = shrink(matrix, by)
    assert bool((shrunk.abs() <= matrix.abs()).all()) and bool((shrunk * matrix >= 0).all())
    assert (matrix - shrunk).abs().max() <= by + 1e-12  # Moreau: the rest is the clipped part
    assert shrunk == pytest.approx(matrix - matrix.clamp(-by, by))
    for turned in (matrix, matrix.T):
        u, s, vt = torch.linalg.svd(turned, full_matrices=False)
        for level in (0.1, 2.0, 100.0):
            expected = (u * (s - level).clamp_min(0)) @ vt
            assert shrink_singular(turned, level) == pytest.approx(expected, abs=1e-10)


def test_scales_of_dead_channels_stay_positive() -> None:
    gram = torch.diag(torch.tensor([4.0, 0.0, 1.0], dtype=torch.float64))
    metric = ChannelScale().metric(InputStats(1, gram, torch.zeros(3, dtype=torch.float64)))
    assert isinstance(metric, Diagonal)
    assert metric.d.tolist() == pytest.approx([2.0, 1e-3, 1.0])
    prepared = RobustPca().prepare(weight_of((6, 3)), metric, 3)
    assert all(bool(array.isfinite().all()) for array in prepared.arrays.values())
    with pytest.raises(NumericsError, match="mean square"):
        ChannelScale().metric(InputStats(1, 0 * gram, torch.zeros(3, dtype=torch.float64)))


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="iterations must be at least 1, got 0"):
        RobustPca(0)
    with pytest.raises(ConfigError, match="lambda_scale"):
        RobustPca(lambda_scale=0)
    with pytest.raises(ConfigError, match="growth must be at least 1"):
        RobustPca(growth=0.9)
    with pytest.raises(ConfigError, match="tolerance"):
        RobustPca(tolerance=1.0)
    with pytest.raises(NumericsError, match="not finite"):
        RobustPca().prepare(torch.full((2, 2), torch.nan), Plain(), 2)
    with pytest.raises(ConfigError, match="plain and diagonal"):
        RobustPca().prepare(torch.eye(2), SecondMoment(torch.eye(2)), 2)
