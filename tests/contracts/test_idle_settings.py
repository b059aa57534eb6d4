"""What nothing would read is refused where something was meant by it, and said where harmless."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress_core.errors import ConfigError
from flows.settings.belonging import GROUPS, belonging
from flows.settings.checks import check_methods
from flows.settings.config import KINDS, RunConfig, SweepConfig
from flows.settings.idle import READERS, idle_notes
from tests.contracts.command_words import words_of
from tests.pipeline import pico

Refuse = Callable[..., str]
TEXTS = {"calibration": "a.jsonl", "eval_text": ["b.jsonl"]}
LEAST: dict[str, Any] = {"model": "m", "kept": 0.5, **TEXTS}


def test_every_setting_says_where_it_stands_and_every_reader_reads_something() -> None:
    fields = [field for kind in KINDS.values() for field in kind.model_fields.values()]
    assert {belonging(field).group for field in fields} < set(GROUPS)
    assert {belonging(field).reader for field in fields} == {"", *READERS}


def checked(values: dict[str, Any]) -> list[str]:
    """What is said of settings; of a sweep where there are several methods."""
    if "methods" in values:
        sweep = SweepConfig(**values | {"kept": [0.5]})
        return idle_notes(sweep, check_methods(sweep, sweep.methods, sweep.kept))
    run = RunConfig(**{"method": "svd_llm"} | values)
    return idle_notes(run, check_methods(run, [run.method], [0.5]))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "steps of no recovery": ({"recover_steps": 9}, "--recover-steps without --recover: say how"),
    "a recovery's seed": ({"recover_seed": 9}, "--recover-seed without --recover: say how"),
    "a text that no block reads": (
        {"recover": "blocks", "recover_text": 0.5},
        "--recover-text is of a training of the whole model: say --recover lora or factors or blo",
    ),
    "processes of nobody": ({"workers": 2}, "--workers without --runner: say whose processes"),
    "a cluster of this machine's processes": (
        {"runner": "processes", "cluster": "tcp://127.0.0.1:8786"},
        "--cluster is of --runner dask or ray: say which",
    ),
    "a training's seed": ({"learn_seed": 9}, "--learn-seed is of methods that train on the whole"),
    "documents of no task": ({"task_limit": 9}, "--task-limit without --tasks: say which tasks"),
    "a field of no evaluation": ({"eval_text": [], "eval_field": "b"}, "--eval-field without --ev"),
    "a field of no calibration": (
        {"method": "svd", "calibration_field": "b"},
        "--calibration-field without --calibration, or with one that nothing reads",
    ),
    "a field of plain text": (
        {"calibration": "a.txt", "calibration_field": "b"},
        "--calibration-field b: a.txt is plain text, which has no fields",
    ),
    "a field of plain evaluation text": (
        {"eval_text": ["a.txt", "b.TXT"], "eval_field": "b"},
        "--eval-field b: a.txt, b.TXT is plain text, which has no fields",
    ),
    "what no kept is measured on": (
        {"kept": None, "target_bytes": "1GB", "of": "model"},
        "--of says what --kept is measured on: there is none",
    ),
    "an allocator beside another": (
        {"method": "svd_llm@hull", "allocate": "uniform"},
        "--allocate uniform: 'svd_llm@hull' names its own allocator",
    ),
    "an option beside itself": (
        {"method": "asvd:alpha=0.3", "options": {"alpha": 0.5}},
        "--option alpha: 'asvd:alpha=0.3' says its own alpha",
    ),
    "an option of an update that is not done": (
        {"options": {"toward_dense": 0.5}},
        "option toward_dense=0.5 of 'svd_llm' changes nothing beside the others",
    ),
    "an order of an update that is not done": (
        {"method": "svd_llm:prefix=block"},
        "option prefix=block of 'svd_llm:prefix=block' changes nothing beside the others",
    ),
    "buckets of a calibration without": (
        {"method": "ada_svd:calibration=streaming:buckets=9"},
        "option buckets=9 of",
    ),
    "a step size without steps": ({"method": "cap:policy=none:eta=0.9"}, "option eta=0.9 of"),
    "damping of a metric that has none": (
        {"method": "svd_llm:metric_damp=0.3"},
        "option metric_damp=0.3 of 'svd_llm:metric_damp=0.3' changes nothing beside the others",
    ),
    "bits among the options": ({"options": {"bits": 4}}, "--option bits=4: give --bits"),
    "bits of what counts in others": (
        {"methods": ["svd_llm", "basis_sharing"], "bits": 4},
        "method 'basis_sharing' shares in-factors among layers: leave out bits=4",
    ),
    "bits of what chooses them": (
        {"method": "svd_llm@prices", "bits": 4},
        "allocator 'prices' chooses bits itself: leave out bits=4",
    ),
    "bits beside a price list that chooses them": (
        {"method": "press:bits=16", "allocate": "prices"},
        "allocator 'prices' chooses bits itself: leave out bits=16",
    ),
    "bits of no codes": (
        {"method": "svd_llm:bits=7"},
        "bits are 16, or 8, 6, 5, 4, 3, 2 for codes; got 7",
    ),
    "groups without codes": (
        {"method": "svd_llm:code_group=64"},
        "option code_group=64 of 'svd_llm:code_group=64' changes nothing beside the others",
    ),
    "a metric among the options": (
        {"options": {"metric": "two_sided"}},
        "--option metric=two_sided: give --metric",
    ),
    "factors among the options": (
        {"options": {"factors": "pivot"}},
        "--option factors=pivot: give --factors",
    ),
    "a metric that one method of two refuses": (
        {"methods": ["svd_llm", "wanda"], "metric": "two_sided"},
        "method 'wanda' prunes, in the metric of the inputs alone: leave out metric=two_sided",
    ),
    "damping of what does not damp": ({"method": "slim:damping=0.2"}, "option damping=0.2 of"),
    "one method under two names": (
        {"methods": ["svd_llm", "svd_llm:update=none"]},
        "methods 'svd_llm' and 'svd_llm:update=none' are the same",
    ),
    "one method with options in another order": (
        {"methods": ["asvd:alpha=0.3:epsilon=1e-4", "svd", "asvd:epsilon=0.0001:alpha=.3"]},
        "'asvd:alpha=0.3:epsilon=1e-4' and 'asvd:epsilon=0.0001:alpha=.3' are the same",
    ),
    "one method with its own allocator": (
        {"methods": ["svd_llm_v2", "svd_llm@by_type"]},
        "methods 'svd_llm_v2' and 'svd_llm@by_type' are the same",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_was_meant_otherwise_is_refused(case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        checked(LEAST | changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)


READ: dict[str, dict[str, Any]] = {
    "by an update": {"options": {"update": "u", "toward_dense": 0.5, "prefix": "block"}},
    "by one method of two": {"methods": ["svd", "svd_llm"], "samples": 9, "bos": True},
    "by a text of two": {"eval_text": ["a.txt", "b.jsonl"], "eval_field": "b"},
    "by a recovery": {"method": "svd", "recover": "lora", "recover_steps": 9, "samples": 9},
    "by a recovery of blocks": {"method": "svd", "recover": "blocks", "recover_held_back": 0.3},
    "by what comes after blocks": {"recover": "blocks+factors", "recover_text": 0.5},
    "by what is held back": {"method": "svd", "eval_text": [], "calibration_field": "b"},
    "by a training": {"method": "soco", "learn_seed": 9},
    "by an allocator": {"method": "svd@hull:probe_share=0.2", "samples": 9},
    "by a metric": {
        "method": "svd",
        "metric": "two_sided",
        "options": {"metric_damp": 0.3},
        "samples": 9,
        "products": "float32",
    },
    "by a metric of its own": {"method": "svd:metric=two_sided:metric_damp=0.3"},
    "by codes": {"bits": 4, "options": {"code_group": 64}},
    "by one method in codes": {"methods": ["svd_llm", "svd_llm:rounding=nearest"], "bits": 4},
    "by one metric of two": {"methods": ["svd", "svd_llm:metric=inputs"], "metric": "two_sided"},
    "a metric that is said twice": {"method": "svd:metric=two_sided", "metric": "two_sided"},
    "and a default": {"options": {"toward_dense": "0"}},
}


@pytest.mark.parametrize("case", READ)
def test_what_is_read_is_accepted_without_a_word(case: str) -> None:
    assert checked(LEAST | READ[case]) == []


def test_what_has_no_effect_is_said() -> None:
    values = LEAST | {"method": "svd", "samples": 9, "bos": True, "products": "float32"}
    assert checked(values) == [
        "--calibration: no effect, 'svd' needs no calibration, and --eval-text is given",
        "--samples, --bos: no effect, 'svd' needs no calibration windows",
        "--products: no effect, 'svd' measures no inputs",
    ]
    only_tasks = {"model": "m", "kept": 0.5, "method": "svd", "tasks": ["piqa"], "eval_windows": 9}
    assert checked(only_tasks | {"length": 99}) == [
        "--length: no effect, there is no text",
        "--eval-windows: no effect, there is no text to evaluate on",
    ]


def test_a_stack_of_batch_that_averages_nothing_is_said() -> None:
    methods = ["svd_llm", "ada_svd", "ada_svd:buckets=16", "ada_svd:calibration=streaming"]
    assert checked(LEAST | {"methods": methods, "samples": 64}) == [
        "ada_svd: stack-of-batch averages nothing, there is a bucket for each of 64 windows; the "
        "paper has --samples 256, buckets here are 64"
    ]
    assert checked(LEAST | {"methods": methods, "samples": 65}) == []


@pytest.mark.parametrize("stage", ["learn", "recover", "probe", "measure", "teacher"])
def test_a_stage_that_no_run_has_is_not_refreshed(
    stage: str, inputs: pico.Inputs, refuse: Refuse
) -> None:
    line = refuse("plan", *words_of(inputs, refresh=stage)[1:])
    assert line.startswith(f"--refresh {stage}: nothing here has that stage; the stages are token")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--kept", "0.5"], "--kept is there twice; give it once"),
        (["--seed", "1", "--seed", "1"], "--seed is there twice; give it once"),
        (["--no-bos", "--bos"], "--bos is there twice; give it once"),
        (["--option", "a=1", "--option", "a=2"], "--option a is there twice; give it once"),
        (["--json", "--json"], "--json is there twice; give it once"),
    ],
)
def test_a_flag_that_is_there_twice(
    words: list[str], line: str, inputs: pico.Inputs, refuse: Refuse
) -> None:
    assert refuse(*words_of(inputs), *words).startswith(line)


@pytest.mark.parametrize(
    "command",
    [("demo", "--home"), ("store", "ls", "--home"), ("store", "gc", "--home"), ("export",)],
)
@pytest.mark.parametrize("path", ["", "  ", "x" * 300, "a\nb"])
def test_a_path_of_a_command_without_settings(
    command: tuple[str, ...], path: str, refuse: Refuse, tmp_path: Path
) -> None:
    assert re.search("is empty|is too long|control character", refuse(*command, path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["model/inside", "home", "home/store/x", "home/x"])
@pytest.mark.parametrize("flag", ["output", "report"])
def test_places_where_no_result_goes(
    flag: str, place: str, inputs: pico.Inputs, refuse: Refuse, tmp_path: Path
) -> None:
    mine = pico.copy_inputs(inputs, tmp_path / "mine")
    (tmp_path / "model").symlink_to(mine.model)
    kinds: dict[str, Any] = {"output": {"method": "svd"}, "report": {"methods": "svd"}}
    command = {"output": "run", "report": "sweep"}[flag]
    line = refuse(command, *words_of(mine, **kinds[flag])[1:], f"--{flag}", place)
    assert line.startswith(f"--{flag} ")
    assert not list(tmp_path.rglob("manifest.json"))


@pytest.mark.parametrize("output", ["a.txt", "a.txt/b", "/proc/a/b", "x" * 250])
def test_an_output_that_cannot_be_made(
    output: str, inputs: pico.Inputs, refuse: Refuse, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("words")
    assert "--output " in refuse(*words_of(inputs, output=output))
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "home"}
