"""The report's prediction where the allocator reads curves of predicted KL."""

from dataclasses import replace
from typing import Any

import pytest

from flows.report.shown import Prediction
from flows.runs.prediction import Known, predict
from tests.made_up import codes_of, layers_of, losses_of, predicted_of

LAYERS = [
    replace(layer, form="auto")  # as the methods here store them
    for layer in layers_of([(40, 40), (20, 40), (40, 30), (30, 40)])
]
RESULT: dict[str, Any] = {"metrics": {"dense": {"texts": {"text": {"length": 64}}}}}


def predicted(method: str, **kept: Any) -> Prediction:
    """What is predicted where this much is left in the store."""
    losses = {layer.name: losses_of(layer, 0).numpy() for layer in LAYERS}
    config: dict[str, Any] = {
        "method": method,
        "options": {},
        "allocate": None,
        "samples": 8,
        "length": 64,
    }
    curves = ("predicted", "codes", "entries", "columns")
    known = {name: dict[str, Any]() for name in ("similarity", "divergence", *curves)} | kept
    found = predict(config, RESULT, LAYERS, Known(losses, **known))
    assert isinstance(found, Prediction)
    return found


def test_the_divergence_is_what_the_curves_leave_at_every_budget() -> None:
    curves = {layer.name: predicted_of(layer, 0).numpy() for layer in LAYERS}
    found = predicted("svd_llm@fisher", predicted=curves)
    assert found.how == "the run's own allocation (fisher)"
    assert found.divergence is not None and len(found.divergence) == len(found.shares) > 5
    assert found.divergence == sorted(found.divergence, reverse=True)
    assert 0 < found.divergence[-1] < sum(float(curve[1]) for curve in curves.values())


def test_what_rounding_costs_is_counted_where_bits_are_chosen() -> None:
    curves = {layer.name: predicted_of(layer, 0).numpy() for layer in LAYERS}
    codes = {layer.name: codes_of(layer, 0).numpy() for layer in LAYERS}
    found = predicted("svd_llm@prices", predicted=curves, codes=codes)
    assert found.how == "the run's own allocation (prices)"
    none = {name: 0 * curve for name, curve in codes.items()}
    exact = predicted("svd_llm@prices", predicted=curves, codes=none)
    assert found.divergence is not None and exact.divergence is not None
    assert all(a > b for a, b in zip(found.divergence, exact.divergence, strict=True))
    lacking = predicted("svd_llm@prices", predicted=curves)
    assert lacking.how.startswith("uniform shares") and lacking.divergence is None


def test_shares_of_layers_in_codes_are_of_their_numbers_of_16_bits() -> None:
    coded = [replace(layer, bits=4) for layer in LAYERS]
    curves = {layer.name: predicted_of(layer, 0).numpy() for layer in LAYERS}
    found = predicted("svd_llm@fisher:bits=4:rounding=nearest", predicted=curves)
    most = sum(x.dense_cost for x in coded) / sum(x.dense_cost for x in LAYERS)
    assert 0.25 < most < 0.4 and found.shares[-1] == most
    assert found.shares[0] == pytest.approx(0.2, abs=0.02)  # the least that is looked at
    assert found.error is not None and found.error[-1] == 0
    assert found.how.endswith("; what rounding to codes adds is not in it")
    in_full = predicted("svd_llm@fisher", predicted=curves)
    assert in_full.shares[-1] == pytest.approx(0.9, abs=0.02) and "rounding" not in in_full.how


def test_without_all_curves_shares_are_uniform_and_no_divergence_is_predicted() -> None:
    first = {LAYERS[0].name: predicted_of(LAYERS[0], 0).numpy()}
    for kept in ({}, first):
        found = predicted("svd_llm@fisher", predicted=kept)
        assert found.how.startswith("uniform shares") and found.divergence is None
