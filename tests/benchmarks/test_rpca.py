"""Robust PCA against one bare SVD of the same matrix, and its two ways to shrink."""

import pytest
import torch

from compress_core.robust_pca import shrink_singular, split
from tests.benchmarks.conftest import Bench

SHAPES = [(512, 512), (512, 1408), (1408, 512)]


def by_svd(matrix: torch.Tensor, by: float) -> torch.Tensor:
    """What ``shrink_singular`` computes, from an SVD."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u * (s - by).clamp_min(0)) @ v


def by_sketch(matrix: torch.Tensor, by: float, rank: int) -> torch.Tensor:
    """The same from a randomised SVD of as many triples as are above ``by``, and ten more."""
    torch.manual_seed(0)
    u, s, v = torch.svd_lowrank(matrix, q=min(rank + 10, *matrix.shape), niter=2)
    return (u * (s - by).clamp_min(0)) @ v.T


@pytest.mark.parametrize("shape", SHAPES)
def test_split(shape: tuple[int, int], bench: Bench) -> None:
    """Time of so many iterations as multiples of the SVD; ranks and densities on the way."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(shape, generator=generator, dtype=torch.float64)
    for iterations in (1, 3, 10, 100):
        ours, bare = bench.seconds(
            lambda count=iterations: split(w, 1.0, count, 0.0),  # type: ignore[misc]
            lambda: torch.linalg.svd(w, full_matrices=False),
            rounds=1 if iterations == 100 else 2,
        )
        found = split(w, 1.0, iterations, 0.0)
        singular = torch.linalg.svdvals(found.low)
        bench.row(
            benchmark=f"rpca {shape[0]}x{shape[1]}, {iterations} iterations",
            of_a_bare_svd=f"{ours / bare:.1f}",
            rank=f"{int((singular > 1e-9 * singular[0]).sum())}",
            density=f"{float((found.entries != 0).double().mean()):.2f}",
            residual=f"{found.residual:.1e}",
        )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.05, 0.5])
def test_shrinkage(shape: tuple[int, int], share: float, bench: Bench) -> None:
    """One shrinkage that leaves a share of the singular values: by Gram, by SVD, by sketch."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(shape, generator=generator, dtype=torch.float64)
    rank = int(share * min(shape))
    level = float(torch.linalg.svdvals(w)[rank])
    gram, full, sketch = bench.seconds(
        lambda: shrink_singular(w, level),
        lambda: by_svd(w, level),
        lambda: by_sketch(w, level, rank),
        rounds=3,
    )
    truth = by_svd(w, level)
    errors = [
        float((found - truth).norm() / truth.norm())
        for found in (shrink_singular(w, level), by_sketch(w, level, rank))
    ]
    bench.row(
        benchmark=f"shrink {shape[0]}x{shape[1]} to {rank} of {min(shape)}",
        gram_of_svd=f"{gram / full:.2f}",
        gram_error=f"{errors[0]:.0e}",
        sketch_of_svd=f"{sketch / full:.2f}",
        sketch_error=f"{errors[1]:.0e}",
    )


def test_iterations_to_a_planted_split(bench: Bench) -> None:
    """Iterations until the residual is 1e-7, as Candès et al. plant it, and the error then."""
    generator = torch.Generator().manual_seed(1)
    for n in (200, 400):
        shape, rank = (n, n), n // 20
        left = torch.randn(n, rank, generator=generator, dtype=torch.float64)
        low = left @ torch.randn(rank, n, generator=generator, dtype=torch.float64) / n
        signs = torch.randn(shape, generator=generator, dtype=torch.float64).sign()
        entries = torch.where(torch.rand(shape, generator=generator) < 0.05, signs, 0.0)
        ours, bare = bench.seconds(
            lambda w=low + entries: split(w, 1.0, 2000, 1e-7),  # type: ignore[misc]
            lambda w=low + entries: torch.linalg.svd(w),  # type: ignore[misc]
            rounds=1,
        )
        found = split(low + entries, 1.0, 2000, 1e-7)
        bench.row(
            benchmark=f"planted {n}x{n}, rank {rank}, 5 % corrupted",
            iterations=f"{found.iterations}",
            of_a_bare_svd=f"{ours / bare:.0f}",
            error=f"{float((found.low - low).norm() / low.norm()):.0e}",
        )
