"""CAP's policies: the budget within one item, the same numbers again, the gradients of the loss."""

import pytest
import torch

from compress_core.errors import BudgetError, ConfigError, NumericsError
from compress_core.gradients import token_loss
from compress_core.learn.base import Assignment, Atoms, Learner, pick
from compress_core.learn.bernoulli import PrintedPolicy
from compress_core.learn.entry import EntryPolicy
from compress_core.learn.gains import mask_gradients
from compress_core.learn.group import GroupPolicy
from compress_core.learn.items import Items, build
from compress_core.learn.loop import Training
from compress_core.learn.rank import Ranking
from compress_core.methods import build_method
from compress_core.robust_pca import RobustPca
from compress_core.types import LayerRef
from tests.learning import Lesson, Memory, dense_weight, lesson, same

KEPT = 0.5
POLICIES: dict[str, Learner] = {
    "printed": PrintedPolicy(4, batch=4),
    "printed on activations": PrintedPolicy(4, batch=4, init="activation"),
    "group": GroupPolicy(3, batch=4, pairs=2),
    "entry": EntryPolicy(4, batch=4),
    "entry on gradients": EntryPolicy(3, init="gradient"),
    "none": Ranking("gradient"),
}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def school(request: pytest.FixtureRequest) -> Lesson:
    return lesson(request.param, RobustPca(3), samples=17)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9])
def test_the_budget_is_met_within_one_item_and_again(
    policy: str, kept: float, school: Lesson
) -> None:
    learned = school.learn(POLICIES[policy], kept)
    layers = school.layout.layers
    budget, stored = kept * school.dense_cost, school.cost(learned)
    assert budget - max(layer.atom_cost for layer in layers) < stored <= budget
    assert learned.report["kept"] * school.dense_cost == pytest.approx(stored)
    for layer in layers:
        low = pick(school.read(layer), learned.chosen[layer.name])
        if low is not None:
            assert low.rank or (low.sparse is not None and low.sparse.nonzeros)
            assert low.dense().shape == dense_weight(school.model(), layer).shape
    assert not any(bool(curve.isinf().any()) for curve in learned.curves.values())
    assert same(learned, school.learn(POLICIES[policy], kept))


@pytest.mark.parametrize("policy", POLICIES)
def test_weights_that_it_changed_it_puts_back(policy: str, school: Lesson) -> None:
    given = school.assignment(POLICIES[policy], KEPT)
    POLICIES[policy].learn(given)
    for layer in school.layout.layers:
        found, dense = (dense_weight(model, layer) for model in (given.model, school.model()))
        assert torch.equal(found, dense)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("stop", [1, 2])
def test_a_stopped_training_goes_on_with_the_same_numbers(
    policy: str, stop: int, school: Lesson
) -> None:
    learner = POLICIES[policy]
    assert same(school.learn(learner, KEPT), school.learn(learner, KEPT, Memory(stop)))


def test_another_seed_draws_otherwise(school: Lesson) -> None:
    learner = EntryPolicy(4, batch=4)
    one, other = (school.learn(learner, KEPT, seed=seed).curves["loss"] for seed in (0, 1))
    assert not torch.equal(one, other)


def test_everything_is_dense_where_the_budget_pays_for_it(school: Lesson) -> None:
    learned = school.learn(PrintedPolicy(1, batch=2), 1.0)
    assert all(chosen.index is None for chosen in learned.chosen.values())
    assert learned.report["loss after"] == pytest.approx(learned.report["loss dense"], abs=1e-4)


def test_a_layer_whose_items_cost_its_weight_stays_dense_and_frees_the_rest(school: Lesson) -> None:
    items = Items(school.model(), school.layout, school.read, 0.6)
    score = torch.rand(len(items), generator=torch.Generator().manual_seed(0))
    components, entries = items.parts(score)[2]
    components += 2
    entries += 2
    mask, dense = items.cut(score)
    assert dense == [number == 2 for number in range(len(dense))]
    chosen = items.chosen(mask, dense)
    stored = sum(chosen[layer.name].cost(layer) for layer in items.layers)
    assert items.budget - max(x.atom_cost for x in items.layers) < stored <= items.budget
    with items.restored():
        items.put_cut(mask, dense)
        for number, layer in enumerate(items.layers):
            low = pick(school.read(layer), chosen[layer.name])
            made = dense_weight(school.model(), layer) if low is None else low.dense()
            assert items.weight(layer) == pytest.approx(made, abs=1e-5), number


def test_mask_gradients_are_those_of_the_loss(school: Lesson) -> None:
    model = school.model()
    layer = school.layout.layers[1]
    atoms = school.read(layer)
    assert atoms.sparse is not None
    token_loss(model, school.windows[:2]).backward()
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
    assert everything == pytest.approx(dense_weight(school.model(), layer), abs=1e-5)


@pytest.mark.parametrize("policy", POLICIES)
def test_what_cannot_be_is_refused_in_one_line(policy: str, school: Lesson) -> None:
    with pytest.raises(BudgetError, match="cannot hold one component of each"):
        POLICIES[policy].check(school.layout.layers, 0.01, 64)
    with pytest.raises(ConfigError, match=r"give --samples of at least 2, not 1"):
        POLICIES[policy].check(school.layout.layers, 0.5, 1)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_loss_that_is_not_finite_names_step_and_layer(policy: str, school: Lesson) -> None:
    model = school.model()
    layer = school.layout.layers[3]
    training = Training(school.windows, "cpu", 1, 0)

    def atoms(asked: LayerRef) -> Atoms:
        found = school.read(asked)
        if asked.name != layer.name:
            return found
        return Atoms(found.ut, found.v * torch.inf, found.energy, found.sparse)

    if policy in ("none", "entry on gradients"):  # it reads the dense weights, not the atoms
        model.get_submodule(layer.name).weight.data.fill_(torch.nan)
    with pytest.raises(NumericsError, match=rf"cap: .* step 0.*{layer.name}"):
        POLICIES[policy].learn(Assignment(model, school.layout, atoms, 0.5, None, training))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ("reading=letter", "must be one of works, printed"),
        ("policy=gradient", "must be one of entry, printed, group, none"),
        ("init=none", "must be one of energy, activation, gradient"),
        ("scale=none2", "must be one of none, activations"),
        ("refit=yes", "must be one of none, anchor, turns, dense, prefix"),
        ("steps=-1", "above 0"),
        ("policy=printed:steps=-1", "above 0"),
        ("policy=group:eta=-1", "above 0"),
        ("eta=inf", "'inf' is no number to compute with"),
        ("policy=group:eta=inf", "'inf' is no number to compute with"),
        ("iterations=-1", "iterations must be at least 1"),
    ],
)
def test_options_out_of_range_are_refused(options: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        build_method(f"cap:{options}")


def test_the_letter_of_the_paper_is_one_word() -> None:
    method = build_method("cap:reading=printed")
    assert method.learn == PrintedPolicy(updates=3, eta=0.05, window=5)
    assert method.decompose == RobustPca(10, 1.0, growth=1.0) and method.fit is None
    assert not method.reads_inputs and method.needs_calibration


def test_an_option_beside_a_reading_changes_that_alone() -> None:
    printed, sharp = (build_method(f"cap:reading=printed{x}") for x in ("", ":policy=entry"))
    assert sharp.learn == EntryPolicy() and sharp.decompose == printed.decompose
    assert build_method("cap:reading=printed:iterations=200").learn == printed.learn
    spelled = "cap:scale=activations:init=gradient:policy=entry:refit=turns:iterations=200"
    assert build_method(spelled).essence == build_method("cap").essence
