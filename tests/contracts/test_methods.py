"""What every method promises, for all of them: a new file in ``methods`` inherits these tests."""

import dataclasses
import pkgutil

import pytest
import torch

import compress_core.methods
from compress_core.errors import ConfigError
from compress_core.method import Method
from compress_core.methods import METHODS, build_method
from compress_core.types import LayerRef, Share
from tests.golden.make import first_rows
from tests.laws.test_decompose import correlated, measured, weight_of

LAYERS = [
    LayerRef("a", 0, 24, 40, "a"),
    LayerRef("b", 0, 40, 24, "b"),
    LayerRef("c", 1, 32, 32, "c"),
]


def losses_at(method: Method, kept: float) -> list[float]:
    """Output error of each layer at that budget, measured on the inputs."""
    shares = method.allocate.allocate(LAYERS, kept, {})
    errors = []
    for layer in LAYERS:
        weight = weight_of((layer.out_features, layer.in_features)).float()
        inputs = correlated(200, layer.in_features)
        metric = method.whiten.metric(measured(inputs))
        prepared = method.decompose.prepare(weight, metric, layer.paying_rank)
        low = method.decompose.realise(first_rows(prepared), shares[layer.name])
        assert low.u.shape == (layer.out_features, shares[layer.name].rank)
        assert low.v.shape == (shares[layer.name].rank, layer.in_features)
        assert low.u.numel() + low.v.numel() == shares[layer.name].cost(layer)
        error = weight.double() - low.u.double() @ low.v.double()
        errors.append(float(((inputs @ error.T) ** 2).mean()))
    return errors


def test_every_file_of_methods_is_in_the_table() -> None:
    files = {module.name for module in pkgutil.iter_modules(compress_core.methods.__path__)}
    assert files == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
class TestMethod:
    """One method at its defaults."""

    def test_it_carries_its_own_name_and_is_data(self, name: str) -> None:
        method = build_method(name)
        assert method.name == name
        assert method == build_method(name)
        with pytest.raises(dataclasses.FrozenInstanceError):
            method.name = "other"  # type: ignore[misc]

    @pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
    def test_it_fits_the_budget(self, name: str, kept: float) -> None:
        shares = build_method(name).allocate.allocate(LAYERS, kept, {})
        cost = sum(shares[layer.name].cost(layer) for layer in LAYERS)
        assert cost <= kept * sum(layer.dense_cost for layer in LAYERS)

    def test_more_budget_never_costs_quality_in_its_own_metric(self, name: str) -> None:
        method = build_method(name)
        for layer in LAYERS:
            metric = method.whiten.metric(measured(correlated(200, layer.in_features)))
            weight = weight_of((layer.out_features, layer.in_features))
            loss = method.decompose.prepare(weight, metric, layer.paying_rank).loss
            assert (loss.diff() <= 0).all()

    def test_it_is_deterministic_to_the_bit(self, name: str) -> None:
        assert losses_at(build_method(name), 0.6) == losses_at(build_method(name), 0.6)

    def test_it_beats_a_random_projection(self, name: str) -> None:
        ours = losses_at(build_method(name), 0.6)
        for layer, error in zip(LAYERS, ours, strict=True):
            weight = weight_of((layer.out_features, layer.in_features))
            rank = Share(int(0.6 * layer.dense_cost) // layer.atom_cost).rank
            random = torch.linalg.qr(weight_of((layer.out_features, rank or 0), seed=9))[0]
            inputs = correlated(200, layer.in_features)
            worse = float(((inputs @ (weight - random @ (random.T @ weight)).T) ** 2).mean())
            assert error < worse


def test_svd_llm_has_the_least_output_error_of_all() -> None:
    best = losses_at(build_method("svd_llm"), 0.5)
    for name in METHODS:
        others = losses_at(build_method(name), 0.5)
        assert all(mine <= other * (1 + 1e-6) for mine, other in zip(best, others, strict=True))


def test_asvd_without_scaling_is_svd() -> None:
    plain = losses_at(build_method("svd"), 0.5)
    flat = losses_at(build_method("asvd", {"alpha": 0}), 0.5)
    assert flat == pytest.approx(plain, rel=1e-4)


def test_options_are_read_as_the_type_of_their_default() -> None:
    assert build_method("asvd", {"alpha": "0.25"}) == build_method("asvd", {"alpha": 0.25})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("svd-llm", {}, "unknown method 'svd-llm'. Did you mean 'svd_llm'"),
        ("asvd", {"alfa": 1}, "no option 'alfa'; its options: alpha, epsilon"),
        ("svd", {"alpha": 1}, "its options: none"),
        ("asvd", {"alpha": "much"}, "must be a float, got 'much'"),
        ("asvd", {"alpha": True}, "must be a float, got True"),
        ("asvd", {"alpha": -1}, "alpha >= 0"),
    ],
)
def test_what_does_not_exist_is_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        build_method(name, options)
    assert message in str(refusal.value)
