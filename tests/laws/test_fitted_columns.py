"""Columns in place of components: which stay, what they are said to cost, how they are fitted."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress_core.allocate.base import price_of
from compress_core.coding.error import output_error
from compress_core.coding.expected import Inputs, steps_squared
from compress_core.coding.expected_columns import ROUNDED, costs_of_columns
from compress_core.coding.expected_entries import LEVELS, level_counts
from compress_core.coding.parts import code_layer
from compress_core.coding.settings import Coding
from compress_core.curvature import OutputFisher
from compress_core.decompose import LowRank, split_inputs
from compress_core.errors import ConfigError
from compress_core.fit import Moments
from compress_core.layer.stored import pack_layer
from compress_core.prune.columns import (
    LOOKED_AT,
    FitColumns,
    PrefixFitColumns,
    Reduced,
    eliminate,
    inverse_of,
)
from compress_core.prune.obs import damped, upper_factor
from compress_core.two_sided import FitTwoSided, TwoSided
from compress_core.types import LayerRef, Share
from tests.made_up import SEEDS, weight_and_curvature, weight_and_inputs

WIDE = torch.float64
GROUP = 4
DAMPING = 0.01


def inverse_moment(h: Tensor) -> Tensor:
    """Of it, damped."""
    return inverse_of(upper_factor(damped(h, DAMPING), DAMPING))


def paired(rows: int, pairs: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same where inputs j and j + pairs are one and the same."""
    weight, h, g = weight_and_curvature(rows, 2 * pairs, seed)
    own = h[:pairs, :pairs]
    return weight, own.repeat(2, 2), g


def best_on(weight: Tensor, h: Tensor, index: Tensor) -> Tensor:
    """W_C + W_R H_RC H_CC⁻¹: what least squares make of the weight on some inputs."""
    rest, kept = split_inputs(len(h), index)
    explained = torch.linalg.solve(h[kept][:, kept], h[kept][:, rest]).T
    return weight[:, kept] + weight[:, rest] @ explained


def error_of(weight: Tensor, found: Reduced) -> Tensor:
    error = weight.clone()
    error[:, found.index] -= found.weight
    return error


def one_by_one(weight: Tensor, h: Tensor, g: Tensor, count: int) -> tuple[list[int], float]:
    """The rule itself: an inverse and a fit for every column that goes."""
    alive, lost = list(range(len(h))), 0.0
    while len(alive) > count:
        best = best_on(weight, h, torch.tensor(alive))
        inverse = torch.linalg.inv(h[alive][:, alive])
        costs = ((g @ best) * best).sum(dim=0) / inverse.diagonal()
        place = int(costs.argmin())
        lost += float(costs[place])
        alive.pop(place)
    return alive, lost


@given(st.integers(1, 12), st.integers(2, 20), SEEDS, st.sampled_from([1, 3, 128]))
def test_columns_go_as_one_by_one_and_what_stays_is_the_best_weight_on_its_inputs(
    rows: int, columns: int, seed: int, block: int
) -> None:
    weight, h, g = weight_and_curvature(rows, columns, seed)
    count, ridged = 1 + seed % (columns - 1), damped(h, DAMPING)
    inverse = inverse_moment(h)
    *_, found = eliminate(weight, g @ weight, inverse, [columns, count], block)
    index, lost = one_by_one(weight, ridged, g, count)
    assert found.index.tolist() == index and found.lost == pytest.approx(lost, rel=1e-6)
    torch.testing.assert_close(found.weight, best_on(weight, ridged, found.index))
    torch.testing.assert_close(found.weighed, g @ found.weight)
    own = ridged[index][:, index]
    torch.testing.assert_close(found.inverse @ own, torch.eye(count, dtype=WIDE))
    error = error_of(weight, found)
    assert found.lost == pytest.approx(2 * output_error(error, ridged, g), rel=1e-6)


def test_many_columns_at_once_lose_hardly_more_than_one_by_one() -> None:
    """More of them than a block is chosen from."""
    weight, h, g = weight_and_curvature(24, 3 * LOOKED_AT, 1)
    counts = [2 * LOOKED_AT, LOOKED_AT, LOOKED_AT // 4]
    inverse = inverse_moment(h)
    found = eliminate(weight, g @ weight, inverse, counts, 24)
    for at_once, count in zip(found, counts, strict=True):
        *_, alone = eliminate(weight, g @ weight, inverse, [count], 1)
        assert len(at_once.index) == count and at_once.lost < 1.02 * alone.lost


@pytest.mark.parametrize("pairs", [8, 2 * LOOKED_AT])
def test_of_inputs_that_say_the_same_one_stays(pairs: int) -> None:
    """Also where both of many pairs are among those that a block is chosen from."""
    weight, h, g = paired(10, pairs, 2)
    left = pairs + pairs // 2
    *_, found = eliminate(weight, g @ weight, inverse_moment(h), [left])
    assert set((found.index % pairs).tolist()) == set(range(pairs))
    lost = output_error(error_of(weight, found), h, g)
    assert lost < 1e-4 * output_error(weight, h, g), "by what is added to H"


def test_inputs_that_are_always_zero_go_first_and_cost_nothing() -> None:
    weight, h, g = weight_and_curvature(6, 10, 3)
    for dead in (2, 7):
        h[dead], h[:, dead] = 0.0, 0.0
    costs, counts = costs_of_columns(weight, Inputs(h), g, GROUP), level_counts(10)
    assert costs[counts.index(8) :, 0].tolist() == [0.0, 0.0] and bool(costs.isfinite().all())
    assert float(costs[counts.index(7), 0]) > 0
    low = FitColumns().fit(weight, Share(0, columns=8), Moments(dense=h))
    assert low.index is not None and low.index.tolist() == [0, 1, 3, 4, 5, 6, 8, 9]
    more = FitColumns().fit(weight, Share(0, columns=9), Moments(dense=h))
    assert more.index is not None and set(low.index.tolist()) < set(more.index.tolist())
    assert output_error(weight - more.dense(), h) < 1e-20


@pytest.mark.parametrize("shape", [(24, 32), (40, 3 * LOOKED_AT), (5, 7)])
@pytest.mark.parametrize("seed", range(2))
def test_the_cost_is_that_of_the_layer_that_is_made_and_falls(
    shape: tuple[int, int], seed: int
) -> None:
    """By G as it is, behind nothing that is compressed."""
    weight, h, g = weight_and_curvature(*shape, seed)
    costs, counts = costs_of_columns(weight, Inputs(h), g, GROUP), level_counts(shape[1])
    assert len(counts) == len(costs) == min(LEVELS, shape[1]) - 1
    outputs, metric = OutputFisher(1, g), TwoSided(1e-12)
    fit = FitTwoSided(FitColumns(), partial(metric.root, outputs), lambda: g.diagonal())
    for place in range(0, len(counts), 6):
        low = fit.fit(weight, Share(0, columns=counts[place]), Moments(dense=h))
        assert low.index is not None and len(low.index) == counts[place] and low.rank == 0
        lost = output_error(weight - low.dense(), h, g)
        assert float(costs[place, 0]) == pytest.approx(lost, rel=1e-4)
    assert bool((costs[:, 0].diff() < 0).all()), "more columns never lose more"
    assert 0 < float(costs[-1, 0]) < float(costs[0, 0]) < output_error(weight, h, g)


def test_a_layer_of_one_input_has_no_level() -> None:
    weight, h, g = weight_and_curvature(3, 2, 4)
    assert costs_of_columns(weight[:, :1], Inputs(h[:1, :1]), g, GROUP).shape == (0, 2)


def test_rounding_columns_of_inputs_that_are_apart_costs_their_ranges() -> None:
    """H = 1: an error of any column counts alike, but for what is added to H."""
    weight, _, g = weight_and_curvature(10, 32, 5)
    eye = torch.eye(32, dtype=WIDE)
    costs, counts = costs_of_columns(weight, Inputs(eye), g, GROUP), level_counts(32)
    for level in ROUNDED:
        *_, found = eliminate(weight, g @ weight, inverse_moment(eye), [level])
        kappa = 0.0
        for column in found.index.tolist():
            for start in range(0, 10, GROUP):
                group = weight[start : start + GROUP, column]
                span = float(group.max().clamp_min(0) - group.min().clamp_max(0))
                weighs = float(g.diagonal()[start : start + GROUP].sum())
                kappa += span**2 * weighs * (1 + DAMPING) / 24
        assert float(costs[counts.index(level), 1]) == pytest.approx(kappa)
    half = costs[counts.index(12), 1] - costs[counts.index(8), 1]
    rest = costs[counts.index(16), 1] - costs[counts.index(12), 1]
    assert float(half) == pytest.approx(float(rest)), "lines between"


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_what_rounding_costs_is_about_what_was_predicted(bits: int) -> None:
    weight, h, g = weight_and_curvature(40, 64, 6)
    count = 64 * ROUNDED[2] // LEVELS
    kappa = float(costs_of_columns(weight, Inputs(h), g, 8)[level_counts(64).index(count), 1])
    low = FitColumns().fit(weight, Share(0, columns=count), Moments(dense=h))
    coded = code_layer(low, h, Coding(bits, 8, order=True), "auto", torch.float32)
    assert set(coded.codes) == {"columns"} and coded.entry == {"rank": 0, "columns": count}
    found = output_error(low.dense() - coded.low.dense(), h, g)
    assert 0.5 < found / (kappa / steps_squared(bits)) < 1.5


@pytest.mark.parametrize("part", [0.0, 0.4, 1.0])
def test_behind_compressed_layers_the_target_is_between_both_outputs(part: float) -> None:
    """The weight that would give it has all of its columns; some of them are its best fit."""
    weight, dense, behind = weight_and_inputs((9, 12), 60, 4)
    h, cross = behind.T @ behind / 60, dense.T @ behind / 60
    moments, target = Moments(prefix=h, cross=cross), weight @ torch.lerp(h, cross, part)
    fit = PrefixFitColumns(part, damping=0.0)
    whole = fit.fit(weight, Share(0, columns=12), moments)
    torch.testing.assert_close(whole.dense() @ h, target)
    some = fit.fit(weight, Share(0, columns=5), moments)
    assert some.index is not None
    torch.testing.assert_close((some.dense() @ h)[:, some.index], target[:, some.index])
    with pytest.raises(ConfigError, match=r"toward_dense must be in \[0, 1\], got 1.5"):
        PrefixFitColumns(1.5)
    with pytest.raises(ConfigError, match="damping, a part of the mean of H, is 0 or more"):
        PrefixFitColumns(damping=-1)


def test_outputs_that_count_more_choose_the_columns_and_do_not_change_their_values() -> None:
    weight, h, _ = weight_and_curvature(10, 16, 5)
    start, moments = Share(0, columns=6), Moments(dense=h)
    plain = FitColumns().fit(weight, start, moments)

    def weighed(diagonal: Tensor) -> LowRank:
        outputs, metric = OutputFisher(1, diagonal.diag()), TwoSided(1e-6)
        root, lengths = partial(metric.root, outputs), partial(metric.lengths, outputs)
        return FitTwoSided(FitColumns(), root, lengths).fit(weight, start, moments)

    torch.testing.assert_close(weighed(torch.full((10,), 3.0, dtype=WIDE)).dense(), plain.dense())
    some = torch.ones(10, dtype=WIDE)
    some[4] = 1000.0
    found = weighed(some)
    assert found.index is not None and found.columns is not None and plain.index is not None
    assert not torch.equal(found.index, plain.index)
    torch.testing.assert_close(found.columns, best_on(weight, damped(h, DAMPING), found.index))
    errors = [output_error((weight - x.dense())[4:5], h) for x in (found, plain)]
    assert errors[0] < errors[1]


@settings(max_examples=40, deadline=None)
@given(out=st.integers(1, 40), into=st.integers(2, 40), part=st.floats(0, 0.99))
def test_columns_in_16_bits_cost_what_the_layer_then_stores(
    out: int, into: int, part: float
) -> None:
    """Each with its index."""
    layer, count = LayerRef("a", 0, out, into, "a", form="auto"), 1 + int(part * (into - 1))
    weight = torch.ones(out, into, dtype=torch.float64)
    low = FitColumns().fit(weight, Share(0, columns=count), Moments(dense=torch.eye(into).double()))
    stored = pack_layer(low, torch.float16, layer.dense_cost, own=True, form="auto")
    share = Share(0, columns=count)
    assert stored.attrs["numbers"] == share.cost(layer) == price_of(layer, share)
    sizes = {x: t.numel() * t.itemsize for x, t in stored.tensors.items()}
    assert sum(sizes.values()) == 2 * share.cost(layer) == 2 * count * (out + 1)
