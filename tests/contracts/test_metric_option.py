"""The option metric=two_sided: what takes it, what refuses it, and that nothing else is moved."""

from dataclasses import replace
from typing import Any

import pytest

from compress_core.errors import ConfigError
from compress_core.methods import METHODS, build_method, option_defaults
from compress_core.two_sided import TwoSided

TAKING = ["svd", "fwsvd", "asvd", "svd_llm", "svd_llm_v2", "ada_svd", "duo_svd", "saes_svd"]
REFUSING = {
    "basis_sharing": "shares in-factors among layers",
    **dict.fromkeys(("wanda", "sparsegpt", "oats", "slim", "hassle_free"), "prunes"),
    **dict.fromkeys(("rtn", "gptq", "caldera"), "keeps the whole weight"),
    **dict.fromkeys(("cap", "soco", "dobi_svd"), "learns what stays of each decomposition"),
}
OWN = ["press"]  # has a metric of its own choice


def test_every_method_takes_it_or_says_why_not() -> None:
    assert {*TAKING, *REFUSING, *OWN} == set(METHODS)


@pytest.mark.parametrize("name", TAKING)
def test_a_method_that_projects_outputs_takes_it_and_changes_in_nothing_else(name: str) -> None:
    built = build_method(f"{name}:metric=two_sided")
    assert built == replace(build_method(name), two_sided=TwoSided(0.1))
    assert built == build_method(name, metric="two_sided")
    assert built == build_method(name, {"metric": "two_sided"})
    assert built.essence != build_method(name).essence
    assert built.needs_calibration
    assert built.reads_inputs == build_method(name).reads_inputs
    assert build_method(f"{name}:metric=inputs", metric="two_sided") == build_method(name)


@pytest.mark.parametrize("name", REFUSING)
def test_other_methods_refuse_it(name: str) -> None:
    ways: list[tuple[str, dict[str, Any]]] = [
        (f"{name}:metric=two_sided", {}),
        (name, {"metric": "two_sided"}),
    ]
    for text, more in ways:
        with pytest.raises(ConfigError) as refusal:
            build_method(text, **more)
        assert str(refusal.value) == (
            f"method {name!r} {REFUSING[name]}, in the metric of the inputs alone: leave out "
            "metric=two_sided"
        )


@pytest.mark.parametrize("name", [*TAKING, *REFUSING])
def test_at_its_default_it_is_not_there(name: str) -> None:
    assert build_method(f"{name}:metric=inputs") == build_method(name)
    assert build_method(name).two_sided is None
    defaults = option_defaults(name)
    assert (defaults["metric"], defaults["metric_damp"]) == ("inputs", 0.1)


def test_it_goes_with_the_other_options_of_every_method() -> None:
    built = build_method(
        "duo_svd@fisher:metric=two_sided:metric_damp=0.3:factors=pivot:damp=0.2:refit_columns=true"
    )
    plain = build_method("duo_svd@fisher:factors=pivot:damp=0.2:refit_columns=true")
    assert built == replace(plain, two_sided=TwoSided(0.3))
    stepped = build_method("svd_llm@hull:metric=two_sided", multiple=8)
    assert stepped == replace(build_method("svd_llm@hull", multiple=8), two_sided=TwoSided())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("svd:metric=outputs", "option 'metric' of method 'svd' must be one of inputs, two_sided"),
        ("svd:metric=two_side", "got 'two_side'. Did you mean 'two_sided'?"),
        ("svd:metric=two_sided:metric_damp=0", "metric_damp must be above 0, got 0"),
        ("svd:metric_damp=-1", "metric_damp must be above 0, got -1"),
        ("svd:metric=two_sided:metric_damp=some", "'metric_damp' of method 'svd' must be a float"),
        ("svd:metric=two_sided:metric_damp=inf", "is no number to compute with"),
        ("svd:metrics=two_sided", "has no option 'metrics'"),
    ],
)
def test_what_is_none_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        build_method(text)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)
