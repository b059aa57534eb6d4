"""What SoCo's training promises: the dense model at the start, the budget at the end."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_core.errors import BudgetError, ConfigError, NumericsError
from compress_core.forms.names import FACTORS, PLAIN
from compress_core.learn.gated import GatedSpectra, score_map
from compress_core.learn.soco import LearnSpectrum, _Run
from compress_core.learn.spectrum import Spectra, affordable_dense, choose, cut, install, overlap
from compress_core.methods import build_method
from compress_core.types import LayerRef, affordable
from tests.families import token_batch
from tests.learning import Lesson, Memory, lesson, same

SHORT = LearnSpectrum(phase1=14, phase2=12, phase3=6, batch=4, rate=0.15)
KEPT = 0.6


def gated_model(school: Lesson, settings: LearnSpectrum, dtype: torch.dtype = torch.float32):
    layers = school.layout.layers
    spectra = Spectra.of(layers, [school.atoms[x.name].energy for x in layers])
    extras = settings.deviation > 0
    gated = GatedSpectra(spectra, settings.map, settings.threshold, settings.order, extras, "cpu")
    model = school.model().to(dtype)
    install(model, spectra, school.atoms, gated.effective, gated.deviation)
    return model, gated, spectra


@pytest.mark.parametrize("family", ["llama", "llama_bias", "gpt2", "gpt_neox", "opt"])
@pytest.mark.parametrize("kind", ["softplus", "sigmoid", "relu"])
def test_scores_of_one_and_no_deviation_are_the_dense_model(family: str, kind: str) -> None:
    school = lesson(family)
    model, gated, _ = gated_model(school, LearnSpectrum(map=kind))  # type: ignore[arg-type]
    assert torch.allclose(gated.all_scores(), torch.ones(1), atol=1e-6)
    tokens = token_batch(9)
    with torch.no_grad():
        dense = school.model()(input_ids=tokens).logits
        assert torch.allclose(model(input_ids=tokens).logits, dense, atol=2e-5)


@pytest.mark.parametrize("kind", ["softplus", "sigmoid", "relu"])
def test_scores_are_never_negative_and_rise_with_their_parameters(kind: str) -> None:
    raw = torch.linspace(-6, 6, 201, dtype=torch.float64)
    scores = score_map(kind, raw)  # type: ignore[arg-type]
    assert bool((scores >= 0).all()) and bool((scores.diff() >= 0).all())
    assert float(scores.max()) > 1.9  # survivors can make up for what is gone


def test_only_scores_and_deviation_are_trained() -> None:
    school = lesson()
    model, gated, spectra = gated_model(school, LearnSpectrum())
    assert not any(p.requires_grad for p in model.parameters())
    assert gated.raw.numel() == sum(min(x.out_features, x.in_features) for x in spectra.layers)
    assert gated.shift.numel() == sum(x.out_features for x in spectra.layers)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("deviation", [1e-3, 0.0])
def test_what_is_exported_is_the_trained_gated_model_cut_at_the_budget(
    family: str, deviation: float
) -> None:
    school = lesson(family)
    learner = dataclasses.replace(SHORT, deviation=deviation)
    learned = school.learn(learner, KEPT)
    budget = affordable(KEPT, school.dense_cost)
    widest = max(layer.atom_cost for layer in school.layout.layers)
    assert budget - widest < school.cost(learned) <= budget
    model, gated, spectra = gated_model(school, learner)
    masks = [learned.chosen[x.name] for x in spectra.layers]
    with torch.no_grad():
        gated.settled.fill_(True)
        gated.stays.zero_()
        for index, chosen in enumerate(masks):
            if chosen.index is None:
                gated.dense[index] = True
                continue
            scores = torch.full((len(school.atoms[spectra.layers[index].name].ut),), -40.0)
            assert chosen.scale is not None
            scores[chosen.index] = chosen.scale + torch.log(-torch.expm1(-chosen.scale))
            gated.raw[spectra.part(index)] = scores  # softplus turned round
            gated.stays[spectra.starts[index] + chosen.index] = True
            if chosen.bias is not None:
                gated.shift[spectra.outputs(index)] = chosen.bias
        tokens = token_batch(3)
        trained = model(input_ids=tokens).logits
        exported = school.compressed(learned.chosen)(input_ids=tokens).logits
    assert torch.allclose(exported, trained, atol=1e-4)
    assert (deviation == 0) == all(c.bias is None for c in masks if c.index is not None)


def test_the_share_comes_down_to_the_target_and_swings_around_it() -> None:
    learner = dataclasses.replace(SHORT, phase1=40, phase2=60, phase3=10, rate=0.04)
    curves = lesson().learn(learner, KEPT).curves
    share, phase = curves["kept"], curves["phase"]
    assert float(share[0]) == 1.0
    swing = share[phase == 2] - KEPT
    assert bool((swing > 0).any()) and bool((swing <= 0).any())
    assert int((swing[1:].sign() != swing[:-1].sign()).sum()) >= 3
    assert float(swing[20:].abs().max()) < 0.06


def test_what_stays_is_settled_half_way_through_phase_3() -> None:
    curves = lesson().learn(SHORT, KEPT).curves
    assert float(curves["undecided"][-1]) == 0.0
    last = curves["kept"][-SHORT.phase3 // 2 :]
    assert bool((last == last[0]).all()) and float(last[0]) <= KEPT


def test_a_dropped_component_does_not_contribute_but_has_a_gradient() -> None:
    _, gated, spectra = gated_model(lesson(), LearnSpectrum())
    with torch.no_grad():
        gated.raw[0] = -1.0  # a score of 0.31
    effective = gated.effective(0)
    assert effective[:2].tolist() == pytest.approx([0.0, 1.0])
    effective[0].backward()
    assert gated.raw.grad is not None and float(gated.raw.grad[0]) > 0
    assert spectra.part(0).start == 0


def test_with_the_gate_from_phase_3_on_the_weight_is_literally_scored_until_then() -> None:
    """W′ = U (Σ ⊙ S) Vᵀ, also below the threshold."""
    learner = dataclasses.replace(SHORT, gate_from=3)
    run = _Run(learner, lesson().assignment(learner, KEPT))
    with torch.no_grad():
        run.gated.raw[0] = -1.0  # a score of 0.31
    first, third = 0, SHORT.phase1 + SHORT.phase2
    run._set(first, run.phase(first))
    assert torch.equal(run.gated.effective(0), run.gated.scores(0))
    run._set(third, run.phase(third))
    assert float(run.gated.effective(0)[0]) == 0.0


def test_kl_is_what_the_teacher_says_and_zero_at_the_first_step() -> None:
    curves = lesson().learn(SHORT, KEPT).curves
    assert float(curves["kl"][0]) == pytest.approx(0.0, abs=1e-5)
    assert bool(curves["kl"].isfinite().all()) and len(curves["kl"]) == SHORT.steps


@pytest.mark.parametrize("stop", [1, 13, 14, 15, 26, 27, 31])
def test_a_stopped_training_goes_on_with_the_same_numbers(stop: int) -> None:
    school = lesson()
    whole, parts = school.learn(SHORT, KEPT), school.learn(SHORT, KEPT, Memory(stop))
    assert same(whole, parts)


def test_another_seed_sees_the_windows_in_another_order() -> None:
    school = lesson()
    assert not same(school.learn(SHORT, KEPT), school.learn(SHORT, KEPT, seed=1))


@pytest.mark.parametrize("phases", [(20, 0, 6), (14, 12, 0), (1, 0, 0)])
def test_any_phase_can_be_left_out(phases: tuple[int, int, int]) -> None:
    first, second, third = phases
    school = lesson()
    learner = dataclasses.replace(SHORT, phase1=first, phase2=second, phase3=third)
    learned = school.learn(learner, 0.5)
    assert school.cost(learned) <= affordable(0.5, school.dense_cost)


def test_in_sigma_order_the_largest_singular_values_survive() -> None:
    school = lesson()
    by_sigma = school.learn(dataclasses.replace(SHORT, order="sigma"), KEPT)
    by_score = school.learn(SHORT, KEPT)
    assert by_sigma.report["overlap with sigma order"] == 1.0
    assert by_score.report["overlap with sigma order"] < 1.0


def test_a_loss_that_is_not_finite_names_step_and_layer() -> None:
    school = lesson()
    name = school.layout.layers[3].name
    bad = torch.full_like(school.atoms[name].v, torch.nan)
    atoms = {**school.atoms, name: dataclasses.replace(school.atoms[name], v=bad)}
    with pytest.raises(NumericsError, match=rf"step 0.*{name}"):
        dataclasses.replace(school, atoms=atoms).learn(SHORT, KEPT)


def test_what_cannot_be_is_refused_before_anything_runs() -> None:
    layers = lesson().layout.layers
    with pytest.raises(BudgetError, match=r"needs kept of at least"):
        SHORT.check(layers, 0.01, 8)
    with pytest.raises(ConfigError, match=r"7 calibration windows are too few"):
        SHORT.check(layers, 0.5, 7)
    for changes in ({"phase1": 0}, {"phase2": -1}, {"rate": 0.0}, {"threshold": 1.0}):
        with pytest.raises(ConfigError, match="soco needs"):
            dataclasses.replace(SHORT, **changes)
    with pytest.raises(ConfigError, match="gate_from"):
        LearnSpectrum(gate_from=2)


SIZES = [(6, 9), (9, 6), (8, 8), (3, 20)]
LAYERS = [LayerRef(f"l{i}", i, m, n, f"l{i}") for i, (m, n) in enumerate(SIZES)]
SPECTRA = Spectra.of(LAYERS, [torch.linspace(5, 1, min(s)).double() for s in SIZES])


def spectra_in(form: str) -> Spectra:
    """The same components, at what they cost in a form."""
    layers = tuple(dataclasses.replace(layer, form=form) for layer in LAYERS)
    return dataclasses.replace(SPECTRA, layers=layers)


@settings(deadline=None)
@given(
    seed=st.integers(0, 10_000),
    kept=st.floats(0.45, 1.0),
    extras=st.booleans(),
    levels=st.integers(1, 30),
    form=st.sampled_from(FACTORS),
)
def test_the_cut_fills_the_budget_with_the_highest_scores(
    seed: int, kept: float, extras: bool, levels: int, form: str
) -> None:
    spectra = spectra_in(form)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (spectra.starts[-1],), generator=generator) / levels
    places = cut(spectra, scores, kept, [False] * 4, extras)
    chosen = choose(spectra, places, scores, torch.zeros(spectra.outs[-1]) if extras else None)
    spent = sum(chosen[layer.name].cost(layer) for layer in spectra.layers)
    budget = affordable(kept, spectra.dense_cost)
    assert spent <= budget
    for index, layer in enumerate(spectra.layers):
        stay, own = places[index], scores[spectra.part(index)]
        assert stay is not None and len(stay) >= 1
        most = spectra.most(index, layer.out_features if extras else 0)
        assert len(stay) <= most
        if len(stay) < most:  # nothing more of it fits
            assert budget - spent < max(x.atom_cost for x in spectra.layers)
        gone = torch.ones(len(own), dtype=torch.bool)
        gone[stay] = False
        assert not gone.any() or float(own[gone].max()) <= float(own[stay].min())


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), form=st.sampled_from(FACTORS))
def test_average_prices_of_what_is_alive_are_what_it_stores(seed: int, form: str) -> None:
    spectra = spectra_in(form)
    alive = torch.rand(spectra.starts[-1], generator=torch.Generator().manual_seed(seed)) < 0.6
    alive[list(spectra.starts[:-1])] = True  # one of every layer
    counts = spectra.counts(alive)
    stored = sum(x.rank_cost(n) for x, n in zip(spectra.layers, counts, strict=True))
    assert float(spectra.prices(alive)[alive].sum()) == pytest.approx(stored / spectra.dense_cost)
    if form == PLAIN:
        own = spectra.prices(~alive)
        assert torch.equal(own, spectra.prices(alive))  # whatever else is alive


def test_in_the_pivot_form_stays_what_plain_factors_could_not_hold() -> None:
    school = lesson()
    settings = dataclasses.replace(SHORT, form="pivot")
    chosen = school.learn(settings, KEPT).chosen
    priced = settings.charged(school.layout.layers)
    budget = affordable(KEPT, sum(x.dense_cost for x in priced))
    stored = sum(chosen[x.name].cost(x) for x in priced)
    assert budget - max(x.atom_cost for x in priced) < stored <= budget
    assert sum(chosen[x.name].cost(x) for x in school.layout.layers) > 1.1 * budget


def test_in_codes_it_is_priced_as_plain_factors_or_refused() -> None:
    for name in ("soco:bits=4", "soco:bits=4:factors=plain"):
        method = build_method(name)
        assert isinstance(method.learn, LearnSpectrum)
        assert (method.form, method.learn.form) == (PLAIN, PLAIN)
    with pytest.raises(ConfigError, match=r"factors=pivot\): leave out bits=4"):
        build_method("soco:bits=4:factors=pivot")


def test_a_dense_layer_is_paid_for_and_one_too_many_is_refused() -> None:
    scores = torch.ones(SPECTRA.starts[-1])
    places = cut(SPECTRA, scores, 0.8, [True, False, False, False], False)
    assert places[0] is None
    with pytest.raises(BudgetError, match="exceeded"):
        cut(SPECTRA, scores, 0.5, [True, True, True, False], False)


def test_a_layer_too_small_for_any_factor_is_paid_for_as_dense() -> None:
    layers = [LayerRef("a", 0, 64, 64, "a"), LayerRef("b", 0, 1, 64, "b")]
    spectra = Spectra.of(layers, [torch.ones(64).double(), torch.ones(1).double()])
    for extras in (False, True):
        places = cut(spectra, torch.ones(65), 0.3, [False, False], extras)
        chosen = choose(spectra, places, torch.ones(65), torch.zeros(65) if extras else None)
        spent = sum(chosen[layer.name].cost(layer) for layer in layers)
        assert places[1] is None and spent <= affordable(0.3, spectra.dense_cost)
        assert affordable_dense(spectra, [0.0, 1.0], 0.3, extras) == [False, True]


@pytest.mark.parametrize("deviation", [0.0, 1e-3])
def test_every_budget_that_is_not_refused_at_once_can_be_cut(deviation: float) -> None:
    learner = dataclasses.replace(SHORT, deviation=deviation)
    for kept in torch.linspace(0.01, 0.9, 400).tolist():
        try:
            learner.check(LAYERS, kept, 8)
        except BudgetError:
            refused = kept
            continue
        cut(SPECTRA, torch.ones(SPECTRA.starts[-1]), kept, [False] * 4, deviation > 0)
    assert 0.01 < refused < 0.9


def test_the_pressure_stays_within_float32() -> None:
    learner = dataclasses.replace(SHORT, phase1=1, phase2=40, phase3=2, rate=1e-3)
    curves = lesson().learn(learner, 0.3).curves  # far above the target all along
    assert bool(curves["kl"].isfinite().all())


def test_the_pressure_leaves_no_trace_in_the_moments_of_the_kl() -> None:
    """Else KL's steps would vanish behind a gradient that is a million times larger."""
    school, moments, raws = lesson(), [], []
    for pressure in (0.0, 0.1, 1e6):
        run = _Run(SHORT, school.assignment(SHORT, KEPT))
        with torch.no_grad():  # away from the dense model, whose KL has no gradient
            run.gated.raw.add_(torch.linspace(-0.3, 0.3, len(run.gated.raw)))
        run.pressure.fill_(pressure)
        before = run.gated.raw.detach().clone()
        run.step(0)
        moments.append(run.optimizer.state[run.gated.raw])
        raws.append(run.gated.raw.detach() - before)
    for name in ("exp_avg", "exp_avg_sq"):
        assert float(moments[0][name].abs().max()) > 0
        assert all(torch.equal(moments[0][name], found[name]) for found in moments)
    free, light, heavy = raws
    assert float(heavy.abs().max()) <= SHORT.rate * (1 + 1e-5)  # by no more than the rate
    assert bool((light <= free).all()) and bool((heavy <= light).all())
    assert bool((light < free).any()) and bool((heavy < light).any())


def test_an_end_that_is_not_finite_is_refused() -> None:
    school = lesson()
    run = _Run(SHORT, school.assignment(SHORT, KEPT))
    with torch.no_grad():
        run.gated.raw[3] = torch.nan
    with pytest.raises(NumericsError, match="soco: the last step"):
        run.finish({})


@pytest.mark.parametrize("option", ["rate", "deviation", "polarise"])
def test_infinite_options_are_refused(option: str) -> None:
    with pytest.raises(ConfigError, match="soco needs finite"):
        LearnSpectrum(**{option: float("inf")})  # type: ignore[arg-type]


def test_overlap_counts_components_that_sigma_order_would_keep() -> None:
    assert overlap([torch.tensor([0, 1, 5]), None, torch.tensor([2])]) == pytest.approx(2 / 4)
