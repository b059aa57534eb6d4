"""CAP's policy over single items: draws are the models they stand for, and nothing gets worse."""

import math

import pytest
import torch
from torch import Tensor

from compress_core.errors import ConfigError
from compress_core.learn.entry import DOUBLINGS, EntryPolicy, _Policy
from compress_core.learn.keep import spent
from compress_core.learn.masks import MaskTraining
from compress_core.refine.turns import ScaledTurns, Turns
from compress_core.robust_pca import RobustPca
from tests.learning import Lesson, lesson

KEPT = 0.5


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def school(request: pytest.FixtureRequest) -> Lesson:
    return lesson(request.param, RobustPca(3), samples=17)


def begun(school: Lesson, refit: str, temperature: float) -> tuple[MaskTraining, _Policy]:
    options = EntryPolicy(3, temperature=temperature, refit=refit)
    run = MaskTraining(school.assignment(options, KEPT), "energy", anchored=refit != "none")
    return run, _Policy(options, run, 3)


@pytest.mark.parametrize("refit", ["none", "turns"])
def test_a_draw_is_the_model_of_its_items(refit: str, school: Lesson) -> None:
    run, policy = begun(school, refit, 0.2)
    items = run.items
    with items.restored():
        policy.begin()
        first, dense = items.cut(policy.worth)
        draw = torch.rand(len(policy.s), generator=torch.Generator().manual_seed(0)) < 0.5
        whole, start = first.clone(), 0
        for parts, near in zip(items.parts(whole), policy.near, strict=True):
            if near is not None:
                for part, index in zip(parts, (near.components, near.entries), strict=True):
                    part[index.long()] = draw[start : start + len(index)]
                    start += len(index)
        assert start == len(draw) > 20 and not torch.equal(whole, first)
        policy._loss(draw, run.windows[:1], 0)
        drawn = [items.weight(layer).clone() for layer in items.layers]
        items.put_cut(whole, dense)
        for weight, layer in zip(drawn, items.layers, strict=True):
            assert weight == pytest.approx(items.weight(layer), abs=1e-5), layer.name


def test_first_probabilities_spend_what_is_open_and_lead_to_the_first_cut(school: Lesson) -> None:
    run, policy = begun(school, "none", 0.05)
    with run.items.restored():
        policy.begin()
        first, _ = run.items.cut(policy.worth)
        again, _ = run.items.cut(policy.score(policy.s))
    assert spent(policy.s, policy.prices) == pytest.approx(policy.room, rel=1e-5)
    assert float((first != again).float().mean()) < 1e-3
    assert 0 < len(policy.s) < len(run.items)


@pytest.mark.parametrize(
    "options",
    [
        EntryPolicy(6),
        EntryPolicy(6, eta=100.0, temperature=1.0),  # throws all away
        EntryPolicy(6, refit="turns", scaled=True),
        EntryPolicy(6, refit="anchor"),
    ],
)
def test_the_better_of_before_and_after_comes_out(options: EntryPolicy, school: Lesson) -> None:
    learned = school.learn(options, KEPT)
    report = learned.report
    assert report["loss after"] == min(report["loss before"], report["loss trained"])
    if report["loss trained"] > report["loss before"]:
        assert report["changed by training"] == 0
    if options.refit == "none":
        found = school.compressed(learned.chosen)
        held = school.windows[-2:]
        loss = float(found(input_ids=held, labels=held).loss.detach())
        assert loss == pytest.approx(report["loss after"], abs=1e-4)


@pytest.mark.parametrize("refit", ["none", "turns"])
def test_entries_are_worth_what_serves_the_first_cut_best(refit: str, school: Lesson) -> None:
    """No worse than as they were, nor than one doubling less or more; components as they were."""
    run, policy = begun(school, refit, 0.05)
    with run.items.restored():
        policy.begin()
        pairs = zip(run.items.parts(run.worth), run.items.parts(policy.worth), strict=True)
        factors = {math.log2(float(new[1][0] / old[1][0])) for old, new in pairs if len(old[1])}
        (doubled,) = factors
        assert doubled in range(DOUBLINGS + 1)
        near = {0, doubled, doubled + 1, max(0, doubled - 1)}
        losses = {n: run.loss_of(run.items.cut(scaled(run, run.worth, n)), 0) for n in near}
    assert losses[doubled] == float(policy.checks[0]) == min(losses.values())
    for old, new in zip(run.items.parts(run.worth), run.items.parts(policy.worth), strict=True):
        assert torch.equal(old[0], new[0])


def scaled(run: MaskTraining, worth: Tensor, doubled: float) -> Tensor:
    """Worths with the entries' doubled so often."""
    found = worth.clone()
    for _, entries in run.items.parts(found):
        entries.mul_(2.0**doubled)
    return found


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="come in pairs, got 3"):
        EntryPolicy(draws=3)
    with pytest.raises(ConfigError, match="a temperature"):
        EntryPolicy(temperature=0.0)
    assert (ScaledTurns().turns, Turns().turns) == (30, 30)
