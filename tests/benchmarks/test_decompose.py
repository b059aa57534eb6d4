"""One layer's decomposition against the literal path of SVD-LLM, and against its own eigh."""

import pytest
import torch

from compress_core.decompose import ProjectOutputs
from compress_core.metric import SecondMoment
from compress_core.types import LayerRef
from tests.benchmarks.conftest import Bench

SHAPES = [(1024, 1024), (1024, 2816), (2816, 1024)]
TOTALS = {"ours": 0.0, "literal": 0.0}


def literal(weight: torch.Tensor, gram: torch.Tensor, rank: int) -> torch.Tensor:
    """Cholesky, inverse and full SVD in float64, as Algorithm 1 of arXiv 2403.07378 reads."""
    s = torch.linalg.cholesky(gram)
    inverse = torch.linalg.inv(s)
    u, sigma, vt = torch.linalg.svd(weight @ s, full_matrices=False)
    root = sigma[:rank].sqrt()
    return (u[:, :rank] * root) @ ((root[:, None] * vt[:rank]) @ inverse)


@pytest.mark.parametrize("shape", SHAPES)
def test_decomposition(shape: tuple[int, int], bench: Bench) -> None:
    """Time as multiples; the error of both at half the parameters, which must agree."""
    out_features, in_features = shape
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    inputs = torch.randn(2 * in_features, in_features, generator=generator, dtype=torch.float64)
    inputs *= torch.logspace(0, -2, in_features, dtype=torch.float64)
    gram = inputs.T @ inputs / len(inputs)
    small = min(shape)
    square = gram[:small, :small].contiguous()
    rank = LayerRef("layer", 0, out_features, in_features, "layer").paying_rank
    ours, paper, bare = bench.seconds(
        lambda: ProjectOutputs().prepare(weight, SecondMoment(gram), rank),
        lambda: literal(weight, gram, rank),
        lambda: torch.linalg.eigh(square),
        rounds=3,
    )
    TOTALS["ours"] += ours
    TOTALS["literal"] += paper
    prepared = ProjectOutputs().prepare(weight, SecondMoment(gram), rank)
    factors = prepared.arrays["ut"].double().T @ prepared.arrays["v"].double()
    errors = [
        float(((weight - w) @ gram * (weight - w)).sum())
        for w in (factors, literal(weight, gram, rank))
    ]
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)
    bench.row(
        benchmark=f"decompose {out_features}x{in_features}",
        faster_than_literal=f"{paper / ours:.1f}",
        of_a_bare_eigh=f"{ours / bare:.2f}",
    )


def test_all_shapes_together(bench: Bench) -> None:
    """The three shapes summed."""
    if TOTALS["ours"]:
        bench.row(
            benchmark="decompose, all three",
            faster_than_literal=f"{TOTALS['literal'] / TOTALS['ours']:.1f}",
        )
