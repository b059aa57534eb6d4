"""CAP's budget set, estimator, cut and policies: what each promises, against brute force."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress_core.decompose import LowRank
from compress_core.errors import BudgetError, ConfigError, NumericsError
from compress_core.hf.checkpoint import Checkpoint
from compress_core.hf.layout import inspect_model
from compress_core.hf.loading import load_model
from compress_core.learn.base import Assignment, Atoms, Chosen, Learned, Learner, pick
from compress_core.learn.bernoulli import EPSILON, EntryPolicy, reinforce
from compress_core.learn.gains import GainPolicy, mask_gradients
from compress_core.learn.group import GroupPolicy, leave_one_out
from compress_core.learn.items import Items, build
from compress_core.learn.keep import fill, probabilities, project, ranking, spent
from compress_core.learn.loop import NoCheckpoints, Training
from compress_core.learn.worth import token_loss
from compress_core.methods import build_method
from compress_core.refine.base import Moments, Refiner
from compress_core.refine.masked import (
    MaskedLeastSquares,
    PrefixMaskedLeastSquares,
    masked_solve,
)
from compress_core.rpca import RobustPca
from compress_core.sparse import Sparse
from compress_core.types import LayerRef, ModelLayout
from compress_core.whiten import Plain
from tests.families import tiny_model, token_batch
from tests.made_up import weight_and_inputs

numbers = st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=12)


def with_costs(values: list[float], data: st.DataObject) -> tuple[Tensor, Tensor]:
    costs = data.draw(
        st.lists(st.integers(1, 9), min_size=len(values), max_size=len(values)), "costs"
    )
    return torch.tensor(values, dtype=torch.float64), torch.tensor(costs)


@given(numbers, st.floats(0, 40), st.data())
def test_the_projection_is_feasible_idempotent_and_nearest(
    values: list[float], budget: float, data: st.DataObject
) -> None:
    wanted, costs = with_costs(values, data)
    found = project(wanted, costs, budget)
    assert bool(((found >= 0) & (found <= 1)).all()) and spent(found, costs) <= budget + 1e-9
    assert project(found, costs, budget + 1e-9) == pytest.approx(found, abs=1e-8)
    generator = torch.Generator().manual_seed(0)  # obtuse angle to every feasible point
    for _ in range(30):
        other = torch.rand(len(found), generator=generator, dtype=torch.float64)
        other *= min(1.0, budget / max(spent(other, costs), 1e-9))
        assert float((wanted - found) @ (other - found)) <= 1e-6


@given(numbers, st.floats(0.5, 40), st.data())
def test_first_probabilities_spend_the_budget_in_the_order_of_worth(
    values: list[float], budget: float, data: st.DataObject
) -> None:
    logits, costs = with_costs(values, data)
    found = probabilities(logits, costs, budget)
    assert spent(found, costs) == pytest.approx(min(budget, float(costs.sum())), rel=1e-6)
    order = logits.argsort()
    assert bool((found[order].diff() >= -1e-12).all())


def test_worthless_items_have_no_probability() -> None:
    logits = torch.tensor([-torch.inf, 0.0, 1.0])
    found = probabilities(logits, torch.tensor([5, 2, 2]), 3)
    assert found[0] == 0 and spent(found, torch.tensor([5, 2, 2])) == pytest.approx(3)
    assert not probabilities(logits[:1], torch.tensor([5]), 3).any()


@given(numbers, st.integers(0, 50), st.data())
def test_the_fill_takes_all_that_fits_in_order(
    values: list[float], room: int, data: st.DataObject
) -> None:
    score, costs = with_costs(values, data)
    order = ranking(score, score)
    bought, left = fill(order, costs, room)
    expected, rest = [], room
    for item in order.tolist():
        if int(costs[item]) <= rest:
            expected.append(item)
            rest -= int(costs[item])
    assert (bought.tolist(), left) == (expected, rest)


def test_ties_go_by_worth_and_then_by_place() -> None:
    score = torch.tensor([1.0, 1.0, 2.0, 1.0])
    assert ranking(score, torch.tensor([0.0, 3.0, 0.0, 3.0])).tolist() == [2, 1, 3, 0]


def test_reinforce_is_unbiased_whatever_the_baseline() -> None:
    """E over all masks of the estimate is the derivative of E[J], J any function of the mask."""
    s = torch.tensor([0.2, 0.7, 0.5], dtype=torch.float64)
    loss = {mask: float(i * i % 7) for i, mask in enumerate(itertools.product((0, 1), repeat=3))}

    def expected(s: Tensor) -> Tensor:
        total = torch.zeros((), dtype=s.dtype)
        for mask, value in loss.items():
            m = torch.tensor(mask, dtype=s.dtype)
            total = total + value * (s * m + (1 - s) * (1 - m)).prod()
        return total

    (truth,) = torch.autograd.grad(expected(leaf := s.clone().requires_grad_(True)), leaf)
    for baseline in (0.0, 3.0):
        mean = torch.zeros_like(s)
        for mask, value in loss.items():
            m = torch.tensor(mask)
            chance = (s * m + (1 - s) * (1 - m)).prod()
            mean += chance * reinforce(value - baseline, m, s)
        assert mean == pytest.approx(truth, abs=50 * EPSILON)


def test_leave_one_out_compares_with_the_others() -> None:
    losses = torch.tensor([1.0, 2.0, 6.0])
    assert leave_one_out(losses).tolist() == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5])
    assert leave_one_out(losses[:1]).tolist() == [0.0]


class Case:
    """A small model, its layers' atoms, and windows."""

    def __init__(self, folder: Path, family: str) -> None:
        self.folder = folder
        tiny_model(family).save_pretrained(folder)
        self.layout: ModelLayout = inspect_model(Checkpoint(folder))
        self.windows = token_batch(rows=17, length=16)
        model = load_model(folder)
        self.weights, self.found = {}, {}
        for layer in self.layout.layers:
            weight = model.get_submodule(layer.name).weight.detach()
            weight = weight.T if layer.transposed else weight
            self.weights[layer.name] = weight
            prepared = RobustPca(3).prepare(weight, Plain(), min(weight.shape))
            energy = prepared.loss[:-1] - prepared.loss[1:]
            arrays = prepared.arrays
            self.found[layer.name] = Atoms(arrays["ut"], arrays["v"], energy, prepared.sparse)

    def atoms(self, layer: LayerRef) -> Atoms:
        return self.found[layer.name]

    def learn(self, learner: Learner, kept: float = 0.5, **given: Any) -> Learned:
        training = Training(self.windows, "cpu", learner.batch, given.pop("seed", 0), **given)
        model = load_model(self.folder)
        learned = learner.learn(Assignment(model, self.layout, self.atoms, kept, None, training))
        for layer in self.layout.layers:  # what it changed it put back
            weight = model.get_submodule(layer.name).weight
            weight = weight.T if layer.transposed else weight
            assert torch.equal(weight, self.weights[layer.name])
        return learned


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp(request.param), request.param)


POLICIES: dict[str, Learner] = {
    "entry": EntryPolicy(4, batch=4),
    "entry on activations": EntryPolicy(4, batch=4, init="activation"),
    "group": GroupPolicy(3, batch=4, pairs=2),
    "gradient": GainPolicy(8),
}


def same(one: Mapping[str, Chosen], other: Mapping[str, Chosen]) -> bool:
    def equal(a: Tensor | None, b: Tensor | None) -> bool:
        return (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))

    return all(
        equal(one[name].index, other[name].index) and equal(one[name].entries, other[name].entries)
        for name in one
    )


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9])
def test_the_budget_is_met_within_one_item_and_again(policy: str, kept: float, case: Case) -> None:
    learned = case.learn(POLICIES[policy], kept)
    layers = case.layout.layers
    budget = kept * sum(layer.dense_cost for layer in layers)
    stored = sum(learned.chosen[layer.name].cost(layer) for layer in layers)
    assert budget - max(layer.atom_cost for layer in layers) < stored <= budget
    assert learned.report["kept"] * sum(x.dense_cost for x in layers) == pytest.approx(stored)
    for layer in layers:
        low = pick(case.atoms(layer), learned.chosen[layer.name])
        if low is not None:
            assert low.rank or (low.sparse is not None and low.sparse.nonzeros)
            assert low.dense().shape == case.weights[layer.name].shape
    assert all(bool(curve.isfinite().all()) for curve in learned.curves.values())
    assert same(learned.chosen, case.learn(POLICIES[policy], kept).chosen)


class Halting(Exception):
    """Stands for a machine that goes away."""


class Kept(NoCheckpoints):
    """Keeps states in memory, and stops the training at one of them."""

    def __init__(self, halt: int) -> None:
        self.halt = halt
        self.state: dict[str, Tensor] | None = None

    def load(self) -> dict[str, Tensor] | None:
        return self.state

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        self.state = {name: tensor.clone() for name, tensor in tensors.items()}
        if step == self.halt:
            raise Halting


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("halt", [1, 2])
def test_an_interrupted_training_goes_on_with_the_same_numbers(
    policy: str, halt: int, case: Case
) -> None:
    whole, checkpoints = case.learn(POLICIES[policy]), Kept(halt)
    with pytest.raises(Halting):
        case.learn(POLICIES[policy], checkpoints=checkpoints)
    checkpoints.halt = 0
    learned = case.learn(POLICIES[policy], checkpoints=checkpoints)
    assert same(learned.chosen, whole.chosen) and learned.report == whole.report
    for name, curve in whole.curves.items():
        assert torch.equal(learned.curves[name], curve)


def test_another_seed_draws_otherwise(case: Case) -> None:
    learner = EntryPolicy(4, batch=4)
    one, other = (case.learn(learner, seed=seed).curves["loss"] for seed in (0, 1))
    assert not torch.equal(one, other)


def test_everything_is_dense_where_the_budget_pays_for_it(case: Case) -> None:
    learned = case.learn(EntryPolicy(1, batch=2), 1.0)
    assert all(chosen.index is None for chosen in learned.chosen.values())
    assert learned.report["loss after"] == pytest.approx(learned.report["loss dense"], abs=1e-4)


def test_a_layer_whose_items_cost_its_weight_stays_dense_and_frees_the_rest(case: Case) -> None:
    items = Items(load_model(case.folder), case.layout, case.atoms, 0.6)
    score = torch.rand(len(items), generator=torch.Generator().manual_seed(0))
    components, entries = items.parts(score)[2]
    components += 2
    entries += 2
    mask, dense = items.cut(ranking(score, score))
    assert dense == [number == 2 for number in range(len(dense))]
    chosen = items.chosen(mask, dense)
    stored = sum(chosen[layer.name].cost(layer) for layer in items.layers)
    assert items.budget - max(x.atom_cost for x in items.layers) < stored <= items.budget
    with items.restored():
        items.put_cut(mask, dense)
        for number, layer in enumerate(items.layers):
            low = pick(case.atoms(layer), chosen[layer.name])
            made = case.weights[layer.name] if low is None else low.dense()
            assert items.weight(layer) == pytest.approx(made, abs=1e-5), number


def test_mask_gradients_are_those_of_the_loss(case: Case) -> None:
    model = load_model(case.folder)
    layer = case.layout.layers[1]
    atoms = case.atoms(layer)
    assert atoms.sparse is not None
    token_loss(model, case.windows[:2]).backward()
    gradient = model.get_submodule(layer.name).weight.grad
    gradient = gradient.T if layer.transposed else gradient
    components, entries = mask_gradients(atoms, gradient)
    masks = [torch.ones(len(part), requires_grad=True) for part in (components, entries)]
    weight = (atoms.ut.T * masks[0]) @ atoms.v
    weight = weight.masked_scatter(
        atoms.sparse.mask, weight[atoms.sparse.mask] + atoms.sparse.values * masks[1]
    )
    truth = torch.autograd.grad((weight * gradient).sum(), masks)
    assert components == pytest.approx(truth[0], abs=1e-6)
    assert entries == pytest.approx(truth[1], abs=1e-6)
    kept = [mask.detach().bool() for mask in masks]
    everything = build(atoms, kept[0], kept[1], "cpu")
    assert everything == pytest.approx(case.weights[layer.name], abs=1e-5)


@pytest.mark.parametrize("policy", POLICIES)
def test_what_cannot_be_is_refused_in_one_line(policy: str, case: Case) -> None:
    with pytest.raises(BudgetError, match="cannot hold one component of each"):
        POLICIES[policy].check(case.layout.layers, 0.01, 64)
    with pytest.raises(ConfigError, match=r"give --samples of at least 2, not 1"):
        POLICIES[policy].check(case.layout.layers, 0.5, 1)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_loss_that_is_not_finite_names_step_and_layer(policy: str, case: Case) -> None:
    model = load_model(case.folder)
    layer = case.layout.layers[3]
    training = Training(case.windows, "cpu", 1, 0)

    def atoms(asked: LayerRef) -> Atoms:
        found = case.atoms(asked)
        if asked.name != layer.name:
            return found
        return Atoms(found.ut, found.v * torch.inf, found.energy, found.sparse)

    if policy == "gradient":  # it reads the dense weights, not the atoms
        model.get_submodule(layer.name).weight.data.fill_(torch.nan)
    with pytest.raises(NumericsError, match=rf"cap: .* step 0.*{layer.name}"):
        POLICIES[policy].learn(Assignment(model, case.layout, atoms, 0.5, None, training))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ("policy=none", "must be one of entry, group, gradient"),
        ("init=none", "must be one of energy, activation"),
        ("scale=none2", "must be one of none, activations"),
        ("refit=yes", "must be one of none, dense, prefix"),
        ("steps=-1", "above 0"),
        ("policy=group:eta=-1", "above 0"),
        ("policy=gradient:steps=-1", "above 0"),
        ("window=0", "above 0"),
        ("iterations=0", "iterations must be at least 1"),
    ],
)
def test_options_out_of_range_are_refused(options: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        build_method(f"cap:{options}")


def test_the_defaults_are_the_papers() -> None:
    method = build_method("cap")
    assert method.learn == EntryPolicy(steps=3, eta=0.05, window=5)
    assert method.decompose == RobustPca(10, 1.0) and method.refine is None
    assert not method.reads_inputs and method.needs_calibration


def test_the_masked_solution_is_that_of_least_squares() -> None:
    weight, dense, _ = weight_and_inputs((6, 10), 80, 0)
    gram = dense.T @ dense / len(dense)
    mask = torch.rand(6, 10, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[2] = False
    found = masked_solve(torch.zeros_like(weight), mask, gram, weight @ gram, 60)
    for row in range(6):
        inside = mask[row]
        truth = torch.linalg.lstsq(dense[:, inside], dense @ weight[row]).solution
        assert found[row][inside] == pytest.approx(truth, abs=1e-8)
        assert not found[row][~inside].any()


@settings(max_examples=15)
@given(st.integers(0, 4), st.integers(0, 100))
def test_a_refit_never_errs_more_and_keeps_rank_and_places(rank: int, seed: int) -> None:
    weight, dense, behind = weight_and_inputs((12, 20), 100, seed)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(12, 20, generator=generator) < 0.3
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    low = LowRank(u[:, :rank] * s[:rank], v[:rank], sparse=Sparse.of(0.5 * weight, mask))
    gram, cross = behind.T @ behind / 100, dense.T @ behind / 100
    cases: list[tuple[Refiner, Moments, Tensor]] = [
        (MaskedLeastSquares(damp=0.0), Moments(dense=dense.T @ dense / 100), dense),
        (PrefixMaskedLeastSquares(damp=0.0), Moments(prefix=gram, cross=cross), behind),
    ]
    for refiner, moments, inputs in cases:
        fitted = refiner.refine(weight, low, moments)
        assert fitted.rank == rank and fitted.sparse is not None
        assert torch.equal(fitted.sparse.mask, mask)
        errors = [
            float((inputs @ x.dense().T - dense @ weight.T).square().sum()) for x in (low, fitted)
        ]
        assert errors[1] <= errors[0] * (1 + 1e-9)
    bare = LowRank(low.u, low.v)
    if rank:
        again = MaskedLeastSquares().refine(weight, bare, cases[0][1])
        assert again.sparse is None and again.rank == rank
