"""Gates: the worse direction, allowances, standard errors, what is missing or was measured else."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress_core.errors import ConfigError
from compress_core.hf.smoke import repetition
from flows.settings.gates import DEFAULTS, build_gates
from tasks.promotion.gates import Verdict, evaluate_gates
from tasks.promotion.metrics import Measured, Measurements, find_metric

ON = Measured("dense0", "float32", {"wiki.txt": "w0", "c4.txt": "c0"}, {"arc": "a0"})
METRICS = {
    "compressed/perplexity": 12.0,
    "dense/perplexity": 10.0,
    "compressed/kl": 0.2,
    "compressed/wiki.txt/perplexity": 12.0,
    "dense/wiki.txt/perplexity": 10.0,
    "compressed/c4.txt/perplexity": 30.0,
    "compressed/arc/acc": 0.50,
    "compressed/arc/acc_stderr": 0.03,
    "dense/arc/acc": 0.60,
    "dense/arc/acc_stderr": 0.04,
    "compressed/gen/exact_match_strict-match": 0.4,
    "compressed/gen/exact_match_stderr_strict-match": 0.02,
    "bytes/compressed": 1000.0,
    "bytes/dense": 2000.0,
}
ONE = Measurements(2, METRICS, ON)


def held(
    gates: dict, version: Measurements = ONE, champion: Measurements | None = None
) -> list[Verdict]:
    return evaluate_gates(build_gates(gates, "of a test").limits, version, champion)


def with_metrics(**metrics: float) -> Measurements:
    """The champion, with some metrics changed; "__" stands for "/"."""
    named = {name.replace("__", "/"): value for name, value in metrics.items()}
    return replace(ONE, version=1, metrics=METRICS | named)


@given(
    st.floats(0.01, 1e6), st.floats(0.01, 1e6), st.floats(0, 50), st.sampled_from(["ppl", "acc"])
)
def test_at_most_so_much_worse(value: float, reference: float, percent: float, kind: str) -> None:
    name, logged = {
        "ppl": ("perplexity", "compressed/perplexity"),
        "acc": ("tasks/arc/acc", "compressed/arc/acc"),
    }[kind]
    allowed = f"{percent:.4f}%"
    percent = float(allowed[:-1])
    metrics = {logged: value}
    (verdict,) = held(
        {name: {"worse_than_champion": allowed}},
        Measurements(2, metrics, ON),
        Measurements(1, {logged: reference}, ON),
    )
    worse = value - reference if kind == "ppl" else reference - value
    margin = worse - percent / 100 * reference
    if abs(margin) > 1e-9 * reference:
        assert verdict.passed == (margin < 0)
    assert verdict.limit is not None


def test_every_gate_is_evaluated_and_says_its_limit() -> None:
    verdicts = held(
        {
            "perplexity": {"max": 11, "worse_than_dense": "10%", "worse_than_champion": "2%"},
            "bytes": {"max": "1.5kB", "worse_than_champion": 100},
            "tasks/arc/acc": {"min": 0.45},
        },
        champion=with_metrics(**{"compressed__perplexity": 11.9, "bytes__compressed": 899.0}),
    )
    assert [(v.metric, v.rule, v.passed) for v in verdicts] == [
        ("perplexity", "max 11", False),
        ("perplexity", "max dense + 10%", False),
        ("perplexity", "max champion + 2%", True),
        ("bytes", "max 1500", True),
        ("bytes", "max champion + 100", False),
        ("tasks/arc/acc", "min 0.45", True),
    ]
    assert [v.limit for v in verdicts] == pytest.approx([11, 11, 12.138, 1500, 999, 0.45])


def test_a_difference_within_its_standard_errors_is_none() -> None:
    def against_dense(**limits: float) -> Verdict:
        return held({"tasks/arc/acc": {"worse_than_dense": "3%", **limits}})[0]

    # 0.60 falls to 0.50; the difference has a standard error of 0.05
    assert not against_dense().passed
    assert against_dense(standard_errors=2.01).passed
    assert not against_dense(standard_errors=1.99).passed
    assert against_dense(standard_errors=2).limit == pytest.approx(0.5)
    assert against_dense(standard_errors=0).limit == pytest.approx(0.582)
    (odd,) = held({"perplexity": {"worse_than_dense": "50%", "standard_errors": 1}})
    assert (odd.passed, odd.why) == (False, "no standard error was recorded")


def test_a_score_of_a_filter_has_its_own_standard_error() -> None:
    metric = find_metric("tasks/gen/exact_match,strict-match")
    assert metric.logged in METRICS
    assert metric.standard_error in METRICS


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_what_is_missing_or_no_number_fails(value: float | None) -> None:
    gate = {"perplexity": {"max": 1e9, "worse_than_dense": 1e9, "worse_than_champion": 1e9}}
    metrics = {k: v for k, v in METRICS.items() if k != "compressed/perplexity"}
    if value is not None:
        metrics["compressed/perplexity"] = value
    verdicts = held(gate, replace(ONE, metrics=metrics), with_metrics())
    assert len(verdicts) == 3
    for verdict in verdicts:
        assert (verdict.passed, verdict.value) == (False, None)
        assert verdict.why == ("not measured" if value is None else f"it is {value}")
    reference = with_metrics(compressed__perplexity=math.nan if value is None else value)
    (verdict,) = held({"perplexity": {"worse_than_champion": 1e9}}, champion=reference)
    assert not verdict.passed
    (verdict,) = held(gate, replace(ONE, metrics=metrics))[2:]
    assert not verdict.passed  # also where there is no champion


def test_without_a_champion_only_what_is_absolute_holds() -> None:
    first, second = held({"kl": {"worse_than_champion": "1%", "max": 0.1}})
    assert (first.rule, first.passed) == ("max 0.1", False)
    assert (second.passed, second.why) == (True, "no champion yet")


@pytest.mark.parametrize(
    ("changed", "gate", "why"),
    [
        ({"texts": {"wiki.txt": "other"}}, "perplexity", "not measured on these windows"),
        ({"dense": "other"}, "kl", "its KL is to another dense model"),
        ({"compute": "bfloat16"}, "perplexity", "it ran in float32 and the other in bfloat16"),
        ({"tasks": {"arc": "other"}}, "tasks/arc/acc", "in another form"),
        ({"tasks": {}}, "tasks/arc/acc", "was not asked arc"),
    ],
)
def test_what_was_measured_on_something_else_is_not_compared(
    changed: dict, gate: str, why: str
) -> None:
    other = replace(with_metrics(), measured=replace(ON, **changed))
    (verdict,) = held({gate: {"worse_than_champion": "50%"}}, champion=other)
    assert not verdict.passed
    assert verdict.why.startswith("not comparable: ") and why in verdict.why
    assert "--measure" in verdict.why
    (size,) = held({"bytes": {"worse_than_champion": "5%"}}, champion=other)
    assert size.passed


def test_a_version_from_before_says_so() -> None:
    (verdict,) = held(
        {"perplexity": {"worse_than_champion": "50%"}},
        champion=replace(ONE, version=1, measured=None),
    )
    assert "version 1 does not say what it was measured on" in verdict.why


def test_the_same_text_is_found_whatever_it_is_called_and_wherever_it_stands() -> None:
    elsewhere = replace(ON, texts={"c4.txt": "c0", "moved.txt": "w0"})
    champion = Measurements(1, {"compressed/moved.txt/perplexity": 11.0}, elsewhere)
    for name in ("perplexity", "texts/wiki.txt/perplexity"):
        (verdict,) = held({name: {"worse_than_champion": "1%"}}, champion=champion)
        assert verdict.limit == pytest.approx(11.11)


def test_what_a_tag_says_comes_back() -> None:
    assert Measured.from_json(ON.to_json()) == ON
    assert [Measured.from_json(text) for text in (None, "", "[]", "{}", "nonsense")] == [None] * 5


@pytest.mark.parametrize(
    ("gates", "words"),
    [
        ({}, "has no gates"),
        ({"perplexitty": {"max": 1}}, "no metric 'perplexitty'. Did you mean 'perplexity'?"),
        ({"perplexity": {}}, "perplexity has no limit"),
        ({"perplexity": {"maximum": 1}}, "no setting called 'maximum'. Did you mean 'max'?"),
        ({"perplexity": 20}, "perplexity takes limits like"),
        ({"perplexity": {"max": math.nan}}, "max is a number, got nan"),
        ({"perplexity": {"max": "20 MB"}}, "max is a number, got '20 MB'"),
        ({"perplexity": {"max": True}}, "True is no value of it"),
        ({"perplexity": {"worse_than_champion": "-2%"}}, "0 or more, got '-2%'"),
        ({"perplexity": {"worse_than_champion": -1}}, "0 or more, got -1"),
        ({"perplexity": {"min": 3, "max": 2}}, "nothing is over 3 and under 2"),
        ({"bytes": {"max": "many"}}, "max is a size like 250MB, got 'many'"),
        ({"kl": {"worse_than_dense": "1%"}}, "of the dense model it is not known"),
        ({"perplexity": {"max": 1, "better": "higher"}}, "the lower is better, not the higher"),
        ({"tasks/arc/elo": {"min": 1}}, "not known which is better"),
        ({"tasks/arc": {"min": 1}}, "there is no metric 'tasks/arc'"),
        ({"texts/wiki.txt": {"max": 1}}, "there is no metric 'texts/wiki.txt'"),
        ({"generation": {"max_loops": 1}}, "no setting called 'max_loops'"),
        ({"generation": {"prompts": []}}, "prompts: list should have at least 1 item"),
        ({"generation": {"prompts": [" "]}}, "is empty"),
        ({"tasks/arc/acc": {"min": 0, "standard_errors": -1}}, "standard_errors: input should be"),
    ],
)
def test_gates_that_mean_nothing_are_one_line(gates: dict, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_gates(gates, "gates.yaml")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_dense_metric_that_is_missing_is_a_mistake() -> None:
    metrics = {name: v for name, v in METRICS.items() if name != "dense/perplexity"}
    with pytest.raises(ConfigError, match="version 2 has no perplexity of the dense model"):
        held({"perplexity": {"worse_than_dense": "1%"}}, replace(ONE, metrics=metrics))


def test_a_score_of_unknown_direction_takes_the_one_it_is_given() -> None:
    gate = {"tasks/arc/acc": {"min": 0.4}, "tasks/gen/toxicity": {"max": 0.4, "better": "lower"}}
    assert [v.passed for v in held(gate)] == [True, False]
    assert held(gate)[1].why == "not measured"


def test_the_defaults_are_gates() -> None:
    gates = build_gates(DEFAULTS, "the defaults")
    assert [gate.metric.name for gate in gates.limits] == ["perplexity"]
    assert gates.generation is not None and len(gates.generation.prompts) == 3


def test_repetition_counts_runs_that_were_there_before() -> None:
    assert repetition([]) == repetition([1, 2, 3, 4]) == repetition(range(50)) == 0
    assert repetition([7] * 64) == pytest.approx(60 / 61)
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
