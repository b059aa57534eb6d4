"""The sweep of SparseGPT and GPTQ: what it does in products of matrices is what is written."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress_core.curvature import STRIP, form_by_column
from compress_core.prune.obs import damped, prune, remove, remove_to_each, upper_factor
from compress_core.prune.select import best_of_all, best_of_groups, read_pattern
from compress_core.prune.sweep import sweep
from tests.made_up import SEEDS, weight_and_inputs

WIDE = torch.float64


def made(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """A weight and a damped second moment of inputs that correlate."""
    weight, inputs, _ = weight_and_inputs((rows, columns), 3 * columns, seed)
    inputs = inputs + 0.7 * inputs.roll(1, 1)
    return weight, damped(inputs.T @ inputs / len(inputs), 0.01)


def by_inverses(weight: Tensor, h: Tensor, width: int, choose: object) -> tuple[Tensor, Tensor]:
    """SparseGPT as it is written: w_F −= w_j / [H_F⁻¹]_jj · H_F⁻¹[:, j], H_F inverted each time.

    A mask is chosen every ``width`` columns by w_j² / [H_F⁻¹]_jj, of the weight as it is by then.
    """
    w, columns = weight.clone(), weight.shape[1]
    kept = torch.zeros_like(weight, dtype=torch.bool)
    inverses = [torch.linalg.inv(h[j:, j:]) for j in range(columns)]
    for j, inverse in enumerate(inverses):
        if j % width == 0:
            group = slice(j, min(j + width, columns))
            divisors = torch.stack([x[0, 0] for x in inverses[group]])
            kept[:, group] = choose(w[:, group].square() / divisors, j)  # type: ignore[operator]
        step = torch.where(kept[:, j], 0.0, w[:, j] / inverse[0, 0])
        w[:, j:] -= step[:, None] * inverse[0]
    return w * kept, kept


@pytest.mark.parametrize("blocksize", [1, 3, 8, 20, 64])
@pytest.mark.parametrize("seed", range(3))
def test_masks_and_values_are_those_of_the_formula(blocksize: int, seed: int) -> None:
    weight, h = made(9, 37, seed)
    count, columns = 9 * 37 // 3, 37

    def choose(scores: Tensor, first: int) -> Tensor:
        behind = first + scores.shape[1]
        return best_of_all(scores, count * behind // columns - count * first // columns)

    values, kept = by_inverses(weight, h, blocksize, choose)
    found = remove(weight, upper_factor(h, 0), count, None, blocksize)
    assert torch.equal(found.mask, kept)
    torch.testing.assert_close(found.dense(), values, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("text", "blocksize"), [("2:4", 16), ("3:5", 16), ("1:2", 1), ("2:8", 4)])
def test_n_of_every_m_are_chosen_when_the_sweep_comes_to_them(text: str, blocksize: int) -> None:
    pattern = read_pattern(text)
    assert pattern is not None
    weight, h = made(7, 40, 4)
    values, kept = by_inverses(
        weight, h, pattern.of, lambda scores, first: best_of_groups(scores, pattern)
    )
    found = remove(weight, upper_factor(h, 0), 0, pattern, blocksize)
    assert torch.equal(found.mask, kept)
    torch.testing.assert_close(found.dense(), values, atol=1e-9, rtol=1e-9)


@given(st.integers(1, 12), st.integers(1, 40), SEEDS, st.integers(1, 16))
def test_several_counts_at_once_are_each_as_alone(
    rows: int, columns: int, seed: int, blocksize: int
) -> None:
    weight, h = made(rows, columns, seed)
    triangle, size = upper_factor(h, 0), weight.numel()
    counts = [size // 8, size // 4, size // 2]
    found = remove_to_each(weight, triangle, counts, blocksize)
    for one, count in enumerate(counts):
        alone = remove(weight, triangle, count, None, blocksize)
        errors = found.errors[:, one].T
        assert torch.equal(found.kept[:, one].T, alone.mask) and int(alone.mask.sum()) == count
        torch.testing.assert_close(weight - errors, alone.dense(), atol=1e-12, rtol=1e-12)
        # What the sweep knows of E R, without a product.
        beyond = (errors - found.wanted[:, one].T) * triangle.diagonal()
        torch.testing.assert_close(errors @ triangle, beyond, atol=1e-10, rtol=1e-9)
        assert not bool(beyond[alone.mask].any())


@given(st.integers(1, 40), SEEDS, st.integers(1, 9), st.integers(1, 30))
def test_what_is_wanted_of_a_group_makes_up_for_all_before_it_at_least_cost(
    columns: int, seed: int, group: int, blocksize: int
) -> None:
    """Of all errors of the columns from a group's first on, those with least tr(E H Eᵀ)."""
    weight, h = made(5, columns, seed)
    triangle, wanted = upper_factor(h, 0), torch.zeros(columns, 5, dtype=WIDE)
    errors, arrived = torch.zeros_like(wanted), []

    def arrive(first: int, together: Tensor) -> None:
        arrived.append(first)
        if first:
            own, before = h[first:, first:], h[first:, :first] @ errors[:first]
            best = -torch.linalg.solve(own, before)[: len(together)]
            torch.testing.assert_close(together, best, atol=1e-9, rtol=1e-8)

    def err(j: int, error: Tensor) -> None:
        errors[j] = wanted[j] + weight[:, j] * (j % 3 > 0)
        error.copy_(errors[j])

    sweep(triangle, wanted, err, blocksize, group, arrive)
    assert arrived == list(range(0, columns, group))
    torch.testing.assert_close(
        errors.T @ triangle, (errors - wanted).T * triangle.diagonal(), atol=1e-10, rtol=1e-9
    )


def test_choices_of_one_sweep_do_not_see_each_other() -> None:
    weight, h = made(4, 12, 0)
    keep, drop = (lambda scores, first, x=x: torch.full_like(scores, x) > 0 for x in (1, 0))
    found = prune(weight, upper_factor(h, 0), [keep, drop, keep], 5, 5)
    assert not bool(found.errors[:, [0, 2]].any())
    assert torch.equal(found.errors[:, 1].T, weight)


@pytest.mark.parametrize("out", [1, 7, STRIP, 2 * STRIP + 9])
def test_half_of_the_products_say_what_all_do(out: int) -> None:
    draw = torch.Generator().manual_seed(out)
    a, b, g = (torch.randn(out, n, generator=draw, dtype=WIDE) for n in (5, 5, out))
    g, inner = g @ g.T, b.T @ b
    each = form_by_column(g, a, a)
    torch.testing.assert_close(each, (a * (g @ a)).sum(dim=0))
    moved = a @ inner  # moved aᵀ is symmetric
    whole = form_by_column(g, moved, a).sum()
    torch.testing.assert_close(whole, ((g @ moved) * a).sum())


@given(st.integers(1, 9), st.integers(1, 9), SEEDS, st.floats(0, 1), st.booleans())
def test_the_best_of_all_are_those_of_a_stable_order(
    rows: int, columns: int, seed: int, part: float, across: bool
) -> None:
    """Ties by place, however the scores lie in memory."""
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 6, (rows, columns), generator=draw).to(WIDE)
    count = int(part * scores.numel())
    wanted = torch.zeros(scores.numel(), dtype=torch.bool)
    wanted[scores.flatten().argsort(descending=True, stable=True)[:count]] = True
    laid = scores.T.contiguous().T if across else scores
    assert torch.equal(best_of_all(laid, count), wanted.view_as(scores))
