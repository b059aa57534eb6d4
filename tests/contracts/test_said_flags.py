"""What a flag says is meant, be it what most methods do; where none is said it is the method's."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from compress_core.allocate import ALLOCATORS, allocator_options
from compress_core.errors import ConfigError
from compress_core.methods import METHODS, OF_ALL, option_defaults
from flows.runs.records import UNSAID, read_run, save_run_record
from flows.settings.checks import check_methods
from flows.settings.command import run_command, sweep_command
from flows.settings.config import FLAGS, KINDS, RunConfig, SweepConfig, build_config
from flows.settings.home import RUNS
from flows.settings.reading import write_yaml
from storage.records import read_record, write_record

LEAST: dict[str, Any] = {"model": "m", "kept": 0.5, "calibration": "a.txt"}
USUAL = {flag: OF_ALL[flag][0] for flag in FLAGS}  # what the flags are of most methods
ROUNDING = {"rtn", "gptq", "caldera"}  # methods that do nothing else, and so refuse 16 bits
OTHERWISE = {"press": {"metric", "bits"}} | {name: {"bits"} for name in ROUNDING}
"""Methods with a default of their own, and of which flags."""
OTHER_THINGS = {"device", "calibration"}
"""Options, speeds of a device and a way to calibrate, called as flags that are not about them."""
PLAIN = {"wanda", "sparsegpt", "cap", "dobi_svd"}  # of no low rank, or charged as plain
PARTS = {  # where in a method it shows, and as what
    "factors": ("form", "auto"),
    "metric": ("two_sided", None),
    "bits": ("coding", None),
}
SAID = [(name, flag) for name in METHODS for flag in FLAGS]


def built(run: RunConfig) -> Any:
    """The method of a run, after all that settings alone are refused for."""
    return check_methods(run, [run.method], [])[run.method]


def essence(**changes: Any) -> Any:
    return built(RunConfig(**LEAST | changes)).essence


def refusal(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        essence(**changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_flag_that_methods_have_an_option_for_has_no_default() -> None:
    """A default of its own would be taken for the method's, or the method's for it."""
    options = {option for name in METHODS for option in option_defaults(name)}
    options |= {option for name in ALLOCATORS for option in allocator_options(name)}
    options -= OTHER_THINGS
    for kind in KINDS.values():
        same = options & set(kind.model_fields)
        assert same == set(FLAGS)
        for flag in same:
            assert kind.model_fields[flag].default is None


def test_the_methods_that_have_defaults_of_their_own() -> None:
    found = {
        name: {flag for flag in FLAGS if option_defaults(name)[flag] != USUAL[flag]}
        for name in METHODS
    }
    assert {name: flags for name, flags in found.items() if flags} == OTHERWISE


@pytest.mark.parametrize(("name", "flag"), SAID)
def test_what_is_usual_is_meant_where_it_is_said(name: str, flag: str) -> None:
    """By a flag or as an option: it is done, or refused; of most methods it changes nothing."""
    if name in ROUNDING and flag == "bits":
        assert refusal(method=name, bits=16).endswith(" 8, 6, 5, 4, 3, 2 bits, got 16")
        return
    part, value = PARTS[flag]
    by_flag = essence(method=name, **{flag: USUAL[flag]})
    assert by_flag == essence(method=f"{name}:{flag}={USUAL[flag]}")
    if name not in ROUNDING:
        assert getattr(by_flag, part) == ("plain" if flag == "factors" and name in PLAIN else value)
    assert (by_flag == essence(method=name)) == (flag not in OTHERWISE.get(name, ()))


@pytest.mark.parametrize(("name", "flag"), SAID)
def test_a_row_is_called_after_a_flag_where_the_method_is_otherwise(name: str, flag: str) -> None:
    said = f":{flag}={USUAL[flag]}" if flag in OTHERWISE.get(name, ()) else ""
    assert RunConfig(**LEAST, method=name).label == name
    assert RunConfig(**LEAST, method=name, **{flag: USUAL[flag]}).label == f"{name}{said}"


def test_a_row_is_called_after_what_the_method_does_not_do_by_itself() -> None:
    for flag, value in {"factors": "plain", "metric": "two_sided"}.items():
        assert RunConfig(**LEAST, method="svd", **{flag: value}).label == f"svd:{flag}={value}"
    assert RunConfig(**LEAST, method="press", metric="two_sided").label == "press"
    assert RunConfig(**LEAST, method="svd", factors="auto").label == "svd"


def test_a_file_means_what_it_says(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({**LEAST, **USUAL, "method": "press"}))
    said = build_config(RunConfig, {}, file)
    assert built(said).essence == essence(
        method="press:bits=16:factors=auto:metric=inputs:metric_damp=0.3"
    )
    for config in (said, RunConfig(**LEAST, method="press")):
        write_yaml(config, file)
        assert build_config(RunConfig, {}, file) == config
    assert run_command(said.model_dump(mode="json")) == (
        "eigenpress run --model m --method press --kept 0.5 --factors auto --metric inputs "
        "--bits 16 --calibration a.txt"
    )


def test_press_takes_its_flags_beside_another_allocator() -> None:
    assert "this one chooses none: give bits=16, or 8" in refusal(method="press@fisher")
    found = essence(method="press@fisher", bits=16)
    assert found == essence(method="press@fisher:bits=16") and found.coding is None


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bits of what chooses them": (
        {"method": "svd_llm@prices", "bits": 16},
        "allocator 'prices' chooses bits itself: leave out bits=16",
    ),
    "bits of factors in 8": (
        {"method": "dobi_svd:remap=true", "bits": 16},
        "method 'dobi_svd' stores its factors in 8 bits: leave out bits=16",
    ),
    "a form of factors in 8 bits": (
        {"method": "dobi_svd:remap=true", "factors": "plain"},
        "method 'dobi_svd' stores its factors in 8 bits: leave out factors=plain",
    ),
    "what the method contradicts": (
        {"method": "press:bits=4", "bits": 16},
        "--bits 16: 'press:bits=4' says its own bits; leave one out",
    ),
    "a form of no product": (
        {"method": "gptq", "factors": "pivot"},
        "--factors pivot changes nothing about 'gptq': leave it out",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_as_it_is_said_is_refused(case: str) -> None:
    changes, message = REFUSED[case]
    assert refusal(**changes) == message


def test_what_one_method_of_a_sweep_takes_is_for_that_one() -> None:
    """The other's own word counts for it, and its run can be asked for again by itself."""
    sweep = SweepConfig(
        **LEAST | {"kept": [0.5]}, methods=["svd", "svd:bits=4", "gptq"], bits=8, factors="pivot"
    )
    methods = check_methods(sweep, sweep.methods, sweep.kept)
    for run in sweep.runs():
        assert run.method == "gptq" or built(run) == methods[run.method]
    assert [run.bits for run in sweep.runs()] == [8, None, 8]
    assert [run.label for run in sweep.runs()][:2] == [
        "svd:factors=pivot:bits=8",
        "svd:bits=4:factors=pivot",
    ]
    commands = sweep_command([run.model_dump(mode="json") for run in sweep.runs()])
    assert [command.count("--bits 8") for command in commands] == [1, 0, 1]


def test_a_record_of_before_does_not_say_what_nobody_said(tmp_path: Path) -> None:
    """Format 1 had the usual values where nothing was said."""
    config = RunConfig(**LEAST, method="press", home=tmp_path)
    file = save_run_record(tmp_path, config.model_copy(update=UNSAID), {})
    assert read_run(tmp_path, file.stem)["config"]["bits"] == 16  # which is said now
    record = read_record(file)
    assert record["format"] == 4
    write_record(file, record | {"format": 1})
    assert read_run(tmp_path, file.stem)["config"] == config.model_dump(mode="json")

    record["config"]["bits"] = 4
    write_record(file, record | {"format": 1})
    assert read_run(tmp_path, file.stem)["config"]["bits"] == 4
    assert list((tmp_path / RUNS).glob("*.json")) == [file]


@pytest.mark.parametrize(
    ("method", "then"),
    [
        ("svd_llm", "plain"),
        ("ada_svd@hull:sweeps=3", "plain"),
        ("svd_llm:factors=pivot", None),
        ("soco", "plain"),
        *((name, None) for name in ("press", "wanda", "dobi_svd:remap=true", "a_former_one")),
    ],
)
def test_an_older_record_says_the_factors_that_were_meant(
    method: str, then: str | None, tmp_path: Path
) -> None:
    """Up to format 2 whoever said nothing of them got plain ones, but for press; then of soco."""
    file = save_run_record(tmp_path, RunConfig(**LEAST, method=method, home=tmp_path), {})
    assert read_run(tmp_path, file.stem)["config"]["factors"] is None
    for older in (1, 2):
        write_record(file, read_record(file) | {"format": older})
        assert read_run(tmp_path, file.stem)["config"]["factors"] == then
    write_record(file, read_record(file) | {"format": 3})
    found = read_run(tmp_path, file.stem)["config"]["factors"]
    assert found == (then if method == "soco" else None)
