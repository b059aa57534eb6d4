"""What Dobi-SVD's training promises: the mask of the paper, the exact budget, the same numbers."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from compress_core.errors import BudgetError, ConfigError, NumericsError
from compress_core.learn.base import Assignment, Learned
from compress_core.learn.dobi import LearnTruncation, _Run, truncation
from compress_core.learn.loop import Training
from compress_core.types import LayerRef, affordable
from tests.learning import Lesson, Memory, Stopped, lesson, same

SHORT = LearnTruncation(steps=6, batch=2, beta=0.5, rate=0.03)
REMAP = dataclasses.replace(SHORT, eight_bits=True)
KEPT = 0.6

both = pytest.mark.parametrize("learner", [SHORT, REMAP], ids=["plain", "remap"])


def run_of(school: Lesson, learner: LearnTruncation = SHORT, kept: float = KEPT) -> Any:
    training = Training(school.windows, "cpu", learner.batch, 0)
    given = Assignment(school.model(), school.layout, school.read, kept, None, training)
    return _Run(learner, given)


def cost(school: Lesson, learner: LearnTruncation, learned: Learned) -> int:
    """Numbers stored for all layers, as the learner is charged for them."""
    layers = learner.charged(school.layout.layers)
    return sum(learned.chosen[layer.name].cost(layer) for layer in layers)


def test_the_mask_has_the_values_of_the_paper() -> None:
    # ½ tanh(β(γ − i)) + ½ with component i counted from its middle: 0.5, 1.5, 2.5, ...
    found = truncation(torch.tensor(2.0), 4, 1.0)
    want = [0.5 * math.tanh(2.0 - i) + 0.5 for i in (0.5, 1.5, 2.5, 3.5)]
    assert found.tolist() == pytest.approx(want)
    assert want[1] + want[2] == pytest.approx(1.0)  # a whole γ lies between two components
    steep = truncation(torch.tensor(2.0), 4, 10.0)
    assert steep.tolist() == pytest.approx([1, 1, 0, 0], abs=1e-4)


@pytest.mark.parametrize("beta", [0.5, 10.0])
def test_the_mask_pulls_at_its_edge(beta: float) -> None:
    rank = torch.tensor(2.25, requires_grad=True)
    mask = truncation(rank, 6, beta)
    for place, value in enumerate(mask):
        (found,) = torch.autograd.grad(value, rank, retain_graph=True)
        tanh = math.tanh(beta * (2.25 - place - 0.5))
        assert float(found) == pytest.approx(0.5 * beta * (1 - tanh**2), abs=1e-6)


def test_gamma_is_pulled_by_the_loss_of_the_text_and_by_the_share() -> None:
    school = lesson()
    run = run_of(school)
    assert [p for p in run.model.parameters() if p.requires_grad] == []

    def loss() -> Tensor:
        logits = run.model(input_ids=school.windows).logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, school.windows[:, 1:].flatten())

    (found,) = torch.autograd.grad(loss(), run.gamma)
    (share,) = torch.autograd.grad(run.kept_now(), run.gamma)
    for index in (0, 4, 13):
        layer, shift = school.layout.layers[index], 0.2
        with torch.no_grad():
            ends = []
            for sign in (1, -1, 0):
                moved = sign * shift / run.sizes[index] if sign else 0.0
                run.gamma[index] += moved
                ends.append((float(loss()), float(run.kept_now())))
                run.gamma[index] -= moved
        per_gamma = run.sizes[index] / (2 * shift)
        slope = (ends[0][0] - ends[1][0]) * per_gamma
        assert float(found[index]) == pytest.approx(float(slope), rel=0.1, abs=2e-4)
        whole = layer.atom_cost * float(run.sizes[index]) / school.dense_cost
        assert float(share[index]) == pytest.approx(whole, rel=1e-4)


def test_beyond_what_pays_a_layer_costs_no_more_than_the_dense_one() -> None:
    school = lesson()
    run = run_of(school)
    with torch.no_grad():
        run.gamma.fill_(1.0)
    assert float(run.kept_now().detach()) == pytest.approx(1.0, abs=1e-5)


@both
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kept", [0.3, 0.45, 0.6, 0.8, 0.95, 1.0])
def test_the_budget_is_met_and_never_passed(
    learner: LearnTruncation, family: str, kept: float
) -> None:
    school = lesson(family)
    learned = school.learn(dataclasses.replace(learner, steps=2), kept)
    layers = learner.charged(school.layout.layers)
    budget, spent = affordable(kept, school.dense_cost), cost(school, learner, learned)
    assert spent <= budget
    full = True
    for layer in layers:
        index = learned.chosen[layer.name].index
        if index is not None:
            assert torch.equal(index, torch.arange(len(index)))  # the first, as γ truncates
            assert 1 <= len(index) <= layer.paying_rank
            full = full and len(index) == layer.paying_rank
    assert full or spent > budget - max(layer.atom_cost for layer in layers)


def test_in_8_bits_the_same_budget_has_more_components() -> None:
    school = lesson()
    plain, remap = school.learn(SHORT, KEPT), school.learn(REMAP, KEPT)
    for layer in school.layout.layers:
        few, more = plain.chosen[layer.name].index, remap.chosen[layer.name].index
        assert few is not None and more is not None
        assert len(more) > len(few)
    whole = school.learn(REMAP, 1.0)
    for layer in school.layout.layers:
        index = whole.chosen[layer.name].index
        small = min(layer.out_features, layer.in_features)
        assert index is None or len(index) == small - 1


@both
@pytest.mark.parametrize("stop", range(1, 6))
def test_a_stopped_training_goes_on_with_the_same_numbers(
    learner: LearnTruncation, stop: int
) -> None:
    school = lesson()
    assert same(school.learn(learner, KEPT), school.learn(learner, KEPT, Memory(stop)))


class Failing(Memory):
    """Keeps a checkpoint, or not, and dies of it; the next time it works."""

    def __init__(self, at: int, kept: bool) -> None:
        super().__init__()
        self.at, self.kept = at, kept

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        dies, self.at = step == self.at, 0 if step == self.at else self.at
        if self.kept or not dies:
            super().save(step, tensors)
        if dies:
            raise Stopped


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_checkpoint_that_fails_costs_steps_and_changes_nothing(at: int, kept: bool) -> None:
    school = lesson()
    assert same(school.learn(SHORT, KEPT), school.learn(SHORT, KEPT, Failing(at, kept)))


def test_the_same_numbers_each_time_and_others_with_another_seed() -> None:
    school = lesson()
    first = school.learn(SHORT, KEPT)
    assert same(first, school.learn(SHORT, KEPT))
    assert not same(first, school.learn(SHORT, KEPT, seed=1))
    assert len(first.curves["loss"]) == SHORT.steps
    assert float(first.curves["kept"][0]) == pytest.approx(KEPT, abs=1e-5)


@both
def test_a_layer_whose_gamma_passes_what_pays_is_dense_where_it_can_be_paid(
    learner: LearnTruncation,
) -> None:
    school = lesson()
    run = run_of(school, learner)
    layers = learner.charged(school.layout.layers)
    with torch.no_grad():
        run.gamma[1] = (layers[1].paying_rank + 1.0) / run.sizes[1]
        run.gamma[2] = (layers[2].paying_rank + 0.5) / run.sizes[2]  # not yet
    learned = run.finish({})
    dense = {x.name for x in layers if learned.chosen[x.name].index is None}
    assert dense == {layers[1].name}
    assert learned.report["dense layers"] == 1
    assert cost(school, learner, learned) <= affordable(KEPT, school.dense_cost)

    run = run_of(school, learner)
    with torch.no_grad():
        run.gamma.fill_(1.0)  # all want to be dense; what fits is, and one component of the others
    learned = run.finish({})
    dense = {x.name for x in layers if learned.chosen[x.name].index is None}
    assert 0 < len(dense) < len(layers)
    assert cost(school, learner, learned) <= affordable(KEPT, school.dense_cost)


def test_an_end_that_is_not_finite_is_refused() -> None:
    run = run_of(lesson())
    with torch.no_grad():
        run.gamma[2] = torch.nan
    with pytest.raises(NumericsError, match="dobi_svd: the last step"):
        run.finish({})


def test_training_lowers_the_loss_at_the_same_share() -> None:
    school = lesson()
    learner = dataclasses.replace(SHORT, steps=40, batch=8, rate=0.01, beta=0.3)
    curves = school.learn(learner, KEPT).curves
    assert float(curves["loss"][-10:].mean()) < float(curves["loss"][0])
    assert float((curves["kept"] - KEPT).abs().max()) < 0.05


def test_what_cannot_be_is_refused_before_anything_runs() -> None:
    layers = lesson().layout.layers
    with pytest.raises(BudgetError, match=r"needs kept of at least 0\.0(\d+)"):
        SHORT.check(layers, 0.01, 8)
    REMAP.check([LayerRef("x", 0, 8, 8, "x")], 0.15, 8)  # 9 of 64 numbers, where plain has 16
    with pytest.raises(BudgetError):
        SHORT.check([LayerRef("x", 0, 8, 8, "x")], 0.15, 8)
    with pytest.raises(ConfigError, match=r"7 calibration windows are too few"):
        SHORT.check(layers, 0.5, 7)
    wrong: list[Any] = [{"steps": 0}, {"batch": 0}, {"beta": 0}, {"rate": -1}, {"beta": math.inf}]
    for changes in wrong:
        with pytest.raises(ConfigError, match="dobi_svd needs"):
            dataclasses.replace(SHORT, **changes)
