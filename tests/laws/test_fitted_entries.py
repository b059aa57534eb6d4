"""Entries in the place of components: what they are said to cost, how they are fitted and coded."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress_core.coding.entries import gptq_entries
from compress_core.coding.error import output_error
from compress_core.coding.expected import Inputs
from compress_core.coding.expected_entries import LEVELS, SWEPT, costs_of_entries, level_counts
from compress_core.coding.gptq import Swept, gptq
from compress_core.coding.grid import decoded, nearest
from compress_core.coding.settings import Coding
from compress_core.curvature import OutputFisher
from compress_core.decompose import LowRank
from compress_core.errors import ConfigError
from compress_core.fit import Moments
from compress_core.prune.fitted import FitEntries, PrefixFitEntries
from compress_core.prune.obs import damped, remove, upper_factor
from compress_core.sparse import Sparse
from compress_core.two_sided import FitTwoSided, TwoSided
from compress_core.types import Share
from tests.made_up import SEEDS, weight_and_curvature, weight_and_inputs

WIDE = torch.float64
GROUP = 4


def entries_of(low: LowRank) -> Sparse:
    assert low.sparse is not None and low.rank == 0 and low.base is None
    return low.sparse


@pytest.mark.parametrize("seed", range(3))
def test_at_swept_levels_the_cost_is_that_of_what_the_sweep_leaves(seed: int) -> None:
    weight, h, g = weight_and_curvature(24, 32, seed)
    counts, costs = level_counts(weight.numel()), costs_of_entries(weight, Inputs(h), g, GROUP)
    assert len(counts) == LEVELS - 1 == len(costs)
    rows, triangle = g.diagonal().sqrt()[:, None], upper_factor(damped(h, 0.01), 0.01)
    for level in SWEPT:
        count = weight.numel() * level // LEVELS
        kept = remove(rows * weight, triangle, count, None, 128).dense() / rows
        lost = ((g @ (weight - kept) @ h) * (weight - kept)).sum() / 2
        assert float(costs[counts.index(count), 0]) == pytest.approx(float(lost))
    assert bool((costs[:, 0].diff() <= 0).all()), "more entries never lose more"


def test_where_inputs_are_apart_and_outputs_alike_the_smallest_entries_go() -> None:
    """H = G = 1: ½ Σ w² of those, above the swept levels, too."""
    weight, _, _ = weight_and_curvature(20, 32, 1)
    inputs, alike = Inputs(torch.eye(32, dtype=WIDE)), torch.eye(20, dtype=WIDE)
    costs = costs_of_entries(weight, inputs, alike, GROUP)
    smallest = weight.square().flatten().sort().values
    for count, (lost, _) in zip(level_counts(weight.numel()), costs.tolist(), strict=True):
        if count * LEVELS // weight.numel() in SWEPT or 2 * count > weight.numel():
            assert lost == pytest.approx(float(smallest[: len(smallest) - count].sum()) / 2)


def test_an_input_that_is_always_zero_costs_nothing_and_a_tiny_layer_has_few_levels() -> None:
    weight, h, g = weight_and_curvature(6, 5, 2)
    h[2], h[:, 2] = 0.0, 0.0
    costs = costs_of_entries(weight, Inputs(h), g, GROUP)
    assert bool(costs.isfinite().all()) and len(costs) == len(level_counts(30)) == 29
    assert level_counts(1) == [] and costs_of_entries(
        weight[:1, :1], Inputs(h[:1, :1]), g[:1, :1], 4
    ).shape == (0, 2)


def test_an_output_that_no_gradient_reaches_costs_nothing() -> None:
    weight, h, g = weight_and_curvature(8, 16, 3)
    g[5], g[:, 5] = 0.0, 0.0
    others = [row for row in range(8) if row != 5]
    costs = costs_of_entries(weight, Inputs(h), g, GROUP)
    alone = costs_of_entries(weight[others], Inputs(h), g[others][:, others], GROUP)
    assert bool(costs.isfinite().all())
    assert float(costs[-1, 0]) < float(costs[0, 0]) and float(costs[0, 0]) > 0
    # What is kept of the silent row could go for nothing, so that the same count loses less.
    assert float(costs[-1, 0]) <= float(alone[-1, 0])


@given(st.integers(2, 16), st.integers(2, 16), SEEDS)
def test_a_fit_has_just_so_many_entries_and_no_more_error_than_the_sweep(
    rows: int, columns: int, seed: int
) -> None:
    weight, h, _ = weight_and_curvature(rows, columns, seed)
    count = 1 + seed % (rows * columns)
    found = entries_of(FitEntries().fit(weight, Share(0, count), Moments(dense=h)))
    ridged = damped(h, 0.01)
    swept = remove(weight, upper_factor(ridged, 0.01), count, None, 128)
    assert found.nonzeros == count and torch.equal(found.mask, swept.mask)
    error, before = (output_error(weight - x.dense(), ridged) for x in (found, swept))
    assert error <= before * (1 + 1e-9) + 1e-20 * float(weight.square().sum())


def test_with_steps_enough_no_value_could_be_better() -> None:
    weight, h, _ = weight_and_curvature(8, 12, 3)
    found = entries_of(FitEntries(steps=60).fit(weight, Share(0, 50), Moments(dense=h)))
    slope = (found.dense() - weight) @ damped(h, 0.01)
    assert float(slope[found.mask].abs().max()) < 1e-9 * float(slope.abs().max())


@pytest.mark.parametrize("part", [0.0, 0.4, 1.0])
def test_behind_compressed_layers_the_target_is_between_both_outputs(part: float) -> None:
    """The weight that would give it has all of its entries."""
    weight, dense, behind = weight_and_inputs((9, 12), 60, 4)
    h, cross = behind.T @ behind / 60, dense.T @ behind / 60
    fit = PrefixFitEntries(part, damping=0.0, steps=0)
    found = entries_of(fit.fit(weight, Share(0, 108), Moments(prefix=h, cross=cross)))
    target = weight @ ((1 - part) * h + part * cross)
    torch.testing.assert_close(found.dense() @ h, target)
    with pytest.raises(ConfigError, match=r"toward_dense must be in \[0, 1\], got 1.5"):
        PrefixFitEntries(1.5)
    with pytest.raises(ConfigError, match="steps of least squares are 0 or more, got -1"):
        PrefixFitEntries(steps=-1)


def test_outputs_that_count_more_keep_more_entries_and_alike_ones_as_without() -> None:
    weight, h, _ = weight_and_curvature(10, 16, 5)
    start, moments = Share(0, 60), Moments(dense=h)
    plain = entries_of(FitEntries().fit(weight, start, moments))

    def weighed(diagonal: Tensor) -> Sparse:
        outputs, metric = OutputFisher(1, diagonal.diag()), TwoSided(1e-6)
        root, lengths = partial(metric.root, outputs), partial(metric.lengths, outputs)
        return entries_of(FitTwoSided(FitEntries(), root, lengths).fit(weight, start, moments))

    alike = weighed(torch.full((10,), 3.0, dtype=WIDE))
    torch.testing.assert_close(alike.dense(), plain.dense())
    some = torch.ones(10, dtype=WIDE)
    some[4] = 100.0
    found = weighed(some)
    assert found.nonzeros == 60 and int(found.mask[4].sum()) > int(plain.mask[4].sum())
    left = weight - found.dense()
    slope = (left @ damped(h, 0.01))[4][found.mask[4]]
    assert float(slope.abs().max()) < 0.05 * float((left @ h)[4].abs().max()), "values are refitted"


@pytest.mark.parametrize("bits", [2, 4])
def test_codes_of_all_entries_are_those_of_the_whole_weight(bits: int) -> None:
    """Groups of a row's length divide both alike."""
    weight, h, _ = weight_and_curvature(7, 12, 6)
    coding = Coding(bits, GROUP, order=True, search=2)
    swept = Swept.of(h, coding)
    everything = Sparse.of(weight, torch.ones_like(weight, dtype=torch.bool))
    found, whole = gptq_entries(everything, swept, coding, WIDE), gptq(weight, swept, coding, WIDE)
    assert torch.equal(found.codes.view(7, 12), whole.codes)
    assert torch.equal(found.scales.view(7, 3), whole.scales)


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_sweep_over_entries_loses_less_than_their_nearest_codes(seed: int, order: bool) -> None:
    weight, h, _ = weight_and_curvature(12, 20, seed)
    coding = Coding(3, GROUP, order=order)
    sparse = entries_of(FitEntries().fit(weight, Share(0, 100), Moments(dense=h)))
    codes = gptq_entries(sparse, Swept.of(h, coding), coding, torch.bfloat16)
    assert codes.codes.shape == (1, 100) and codes.scales.shape == (1, 25)
    plain = nearest(sparse.values[None], 3, GROUP, torch.bfloat16)
    errors = [
        output_error(sparse.dense() - replace(sparse, values=decoded(x, GROUP)[0]).dense(), h)
        for x in (codes, plain)
    ]
    assert errors[0] < errors[1]


def test_where_inputs_are_apart_every_entry_takes_its_nearest_code() -> None:
    weight, _, _ = weight_and_curvature(6, 10, 7)
    sparse = Sparse.of(weight, weight.abs() > 0.3)
    coding = Coding(4, GROUP)
    found = gptq_entries(sparse, Swept.of(torch.eye(10, dtype=WIDE), coding), coding, WIDE)
    assert torch.equal(found.codes, nearest(sparse.values[None], 4, GROUP, WIDE).codes)
