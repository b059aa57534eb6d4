"""A command that names no method is one of `press`, and is refused what `press` is refused."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from flows.commands.plan import as_run_or_sweep
from flows.settings.config import DEFAULT_METHOD, RunConfig, SweepConfig
from tests.contracts.command_words import words_of
from tests.pipeline import pico

Call = Callable[..., tuple[int, str, str]]
Refuse = Callable[..., str]


def test_press_is_the_method_where_none_is_named() -> None:
    assert DEFAULT_METHOD == "press" == RunConfig(model="m", kept=0.5).method
    planned = as_run_or_sweep({"model": "m", "kept": 0.5})
    assert isinstance(planned, RunConfig) and planned.method == "press"


def test_a_plan_of_several_budgets_is_of_that_method_too() -> None:
    planned = as_run_or_sweep({"model": "m", "kept": [0.5, 0.3]})
    assert isinstance(planned, SweepConfig)
    assert [(run.method, run.kept) for run in planned.runs()] == [("press", 0.5), ("press", 0.3)]


def test_a_sweep_names_its_methods(inputs: pico.Inputs, refuse: Refuse) -> None:
    line = refuse("sweep", *words_of(inputs, method=None)[1:])
    assert line == "methods is missing (--methods or `methods:` in --config)"


def test_help_and_the_list_of_methods_say_so(call: Call) -> None:
    for command in ("run", "plan"):
        assert "(default: press)" in " ".join(call(command, "--help")[1].split())
    assert "names no method takes press." in " ".join(call("methods")[1].split())


def test_a_plan_has_its_stages(inputs: pico.Inputs, call: Call) -> None:
    code, out, err = call("plan", *words_of(inputs, method=None)[1:], "--json")
    assert (code, err) == (0, "")
    by_name = json.loads(call("plan", *words_of(inputs, method="press")[1:], "--json")[1])
    units = json.loads(out)["units"]
    assert units == by_name["units"]
    assert {"predict", "measure", "advance"} <= {unit["stage"] for unit in units}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"calibration": None}, "method 'press' needs calibration text: give --calibration FILE"),
        (
            {"allocate": "hull"},
            "method 'press' leaves bits to its own allocator, and this one choo",
        ),
        (
            {"rank_multiple": 8},
            "method 'press' buys ranks and bits from one list: leave out --rank",
        ),
        (
            {"recover": "lora"},
            "--recover lora makes updates that codes, which 'press' stores, cann",
        ),
    ],
)
def test_what_it_cannot_do_is_refused_before_any_work(
    changes: dict[str, Any], line: str, inputs: pico.Inputs, refuse: Refuse, tmp_path: Any
) -> None:
    for command in ("run", "plan"):
        assert refuse(command, *words_of(inputs, method=None, **changes)[1:]).startswith(line)
    assert not list(tmp_path.rglob("manifest.json"))
