"""Every mistake on the command line is one clear line and exit code 2, before any flow starts."""

import json
import re
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from storage.records import write_record
from tests.contracts.command_words import words_of
from tests.pipeline import pico
from tests.users import without_root

Refuse = Callable[..., str]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["rum"], r"No such command 'rum'.*\(see `eigenpress --help`\)"),
        (["store"], r"Missing command\. \(see `eigenpress store --help`\)"),
        (["store", "list"], r"No such command 'list'.*\(see `eigenpress store --help`\)"),
        (["run", "--colour", "red"], r"No such option: --colour.* \(see `eigenpress run --help`\)"),
        (["run", "stray"], r".*extra argument.*stray.* \(see `eigenpress run --help`\)"),
        (["run", "--kept"], r"Option '--kept' requires an argument"),
        (["run", "--kept", "half"], r"Invalid value for '--kept': .*"),
        (["run", "--samples", "2.5"], r"Invalid value for '--samples': .*"),
        (["export"], r"Missing argument 'DIR'.*\(see `eigenpress export --help`\)"),
        (["run", "--kept", "0.5"], r"model is missing \(--model or `model:` in --config\)"),
        (["sweep", "--model", "m", "--kept", "0.5"], r"methods is missing .*"),
        (["sweep", "--model", "m", "--methods", ",", "--kept", "0.5"], r"methods '' is empty: "),
    ],
)
def test_words_that_mean_nothing(words: list[str], line: str, refuse: Refuse) -> None:
    assert re.match(line, refuse(*words))


@pytest.mark.parametrize("kept", ["0", "1.5", "-1", "nan"])
@pytest.mark.parametrize("command", ["run", "plan", "sweep"])
def test_kept_outside_its_range(command: str, kept: str, refuse: Refuse, tmp_path: Path) -> None:
    methods = ["--methods", "svd"] if command == "sweep" else []
    line = refuse(command, "--model", "m", "--kept", kept, *methods, "--home", tmp_path / "home")
    assert line.startswith(f"kept must be in (0, 1], got {float(kept):g}: it is the share of ")
    assert not (tmp_path / "home").exists()


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown method": ({"method": "svdllm"}, "unknown method 'svdllm'. Did you mean 'svd_llm'?"),
    "option of another": ({"option": "alpha=1"}, "method 'svd_llm' has no option 'alpha'"),
    "option of no kind": (
        {"method": "asvd", "option": "alpha=high"},
        "option 'alpha' of method 'asvd' must be a float, got 'high'",
    ),
    "option out of range": (
        {"method": "asvd", "option": "alpha=-1"},
        "asvd needs alpha >= 0 and epsilon > 0, got alpha=-1",
    ),
    "option without value": ({"option": "alpha"}, "--option takes NAME=VALUE, got 'alpha'"),
    "no samples": ({"samples": 0}, "samples: input should be greater than or equal to 1, got 0"),
    "missing model": ({"model": "/nowhere/model"}, "no such folder: /nowhere/model"),
    "model is a file": ({"model": "a.txt"}, "a.txt is a file: give the model's folder"),
    "no model": ({"model": "./empty"}, "is a folder that is no model: it has no config.json"),
    "unknown hub id": ({"model": "no/such"}, "no/such: no such folder, and the hub could not"),
    "compressed model": ({"model": "./compressed"}, "is already compressed: start from the dense"),
    "missing text": ({"calibration": "no.txt"}, "no.txt does not exist; check the path"),
    "missing text path": ({"calibration": "./no"}, "./no does not exist; check the path"),
    "text is a folder": (
        {"calibration": "./empty"},
        "calibration text ./empty is a folder without texts",
    ),
    "missing evaluation": ({"eval_text": "no.txt"}, "no.txt does not exist; check the path"),
    "no calibration": (
        {"calibration": None},
        "method 'svd_llm' needs calibration text: give ",
    ),
    "nothing to measure on": (
        {"method": "svd", "calibration": None, "eval_text": None},
        "nothing to evaluate on: give --eval-text FILE, --tasks NAME or --calibration FILE",
    ),
    "folder without tasks": ({"task_path": "empty"}, "--task-path without --tasks: say which "),
    "limit without tasks": ({"task_limit": 5}, "--task-limit without --tasks: say which "),
    "examples without tasks": ({"num_fewshot": 5}, "--num-fewshot without --tasks: say which "),
    "template without tasks": (
        {"config": "template.yaml"},
        "--apply-chat-template without --tasks: say which ",
    ),
    "bad rows of no text": (
        {"method": "svd", "calibration": None, "eval_text": None, "tasks": "a", "skip_bad_rows": 1},
        "--skip-bad-rows without a text: give ",
    ),
    "missing task file": ({"tasks": "./no.yaml"}, "task file ./no.yaml does not exist; check the "),
    "task is a folder": ({"tasks": "./empty"}, "task ./empty is a folder: give the path of a YAML"),
    "field of no evaluation text": (
        {"eval_text": None, "eval_field": "body"},
        "--eval-field without --eval-text: say of which text",
    ),
    "field of no calibration text": (
        {"method": "svd", "calibration": None, "calibration_field": "body"},
        "--calibration-field without --calibration, or with one that nothing reads: say of which",
    ),
    "seed of no training": (
        {"learn_seed": 1},
        "--learn-seed is of methods that train on the whole model; 'svd_llm' does not",
    ),
    "seed beyond what torch takes": ({"seed": 10**25}, "seed: "),
    "missing task folder": (
        {"task_path": "none", "tasks": "mine"},
        "task folder none does not exist; check the path",
    ),
    "unknown device": ({"device": "gpu"}, "--device gpu cannot be used: "),
    "second processor": ({"device": "cpu:7"}, "--device cpu:7: the processor is one device; use"),
    "device that computes nothing": ({"device": "meta"}, "--device meta computes nothing; use cpu"),
    "too small a budget": ({"kept": 0.001}, "kept=0.001 leaves layer model.layers.0.self_attn.q_p"),
    "budget without layers": (
        {"kept": 0.01, "of": "model"},
        "kept=0.01 of the whole model leaves nothing for the layers",
    ),
    "home is a file": ({"home": "a.txt"}, "the data directory a.txt is a file or lies "),
    "home below a file": (
        {"home": "a.txt/b"},
        "the data directory a.txt/b is a file or lies ",
    ),
    "missing settings": ({"config": "no.yaml"}, "cannot read --config no.yaml: No such file"),
    "unknown setting": ({"config": "unknown.yaml"}, "there is no setting called 'hue' (with "),
    "wrong setting": ({"config": "wrong.yaml"}, "seed: input should be a valid integer"),
    "not YAML": ({"config": "broken.yaml"}, "--config broken.yaml is not YAML: "),
    "output is a file": ({"output": "a.txt"}, "--output"),
    "output is in use": ({"output": "compressed"}, "--output"),
}


def make_mistakes(folder: Path) -> None:
    """The files that `MISTAKES` speaks of."""
    (folder / "empty").mkdir()
    (folder / "a.txt").write_text("words")
    (folder / "a.csv").write_text("a,b")
    (folder / "unknown.yaml").write_text("hue: red\n")
    (folder / "wrong.yaml").write_text("seed: red\n")
    (folder / "template.yaml").write_text("apply_chat_template: true\n")
    (folder / "broken.yaml").write_text("a: [b\n")
    (folder / "compressed").mkdir()
    settings = {"quantization_config": {"quant_method": "eigenpress"}}
    (folder / "compressed" / "config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_before_any_stage(
    mistake: str, inputs: pico.Inputs, refuse: Refuse, tmp_path: Path
) -> None:
    changes, expected = MISTAKES[mistake]
    make_mistakes(tmp_path)

    assert expected in refuse(*words_of(inputs, **changes))
    assert not list(tmp_path.rglob("manifest.json"))


@pytest.mark.parametrize("which", ["calibration", "eval_text"])
@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "table.csv",
            "a,b\n1,2\n",
            "table.csv: no row has a field 'text'; the fields there are: ",
        ),
        ("paper.pdf", "a", "paper.pdf: cannot read a .pdf file; give .txt, .md, .jsonl, "),
        ("short.txt", "a few words", "tokens and one window needs 32; give more text"),
        ("empty.txt", "", "empty.txt holds no text; give a source with some"),
        (
            "other.jsonl",
            '{"body": "words"}\n',
            "no row has a field 'text'; the fields there",
        ),
    ],
)
def test_text_that_will_not_do(
    which: str, name: str, text: str, expected: str, inputs: pico.Inputs, refuse: Refuse
) -> None:
    Path(name).write_text(text)

    assert expected in refuse(*words_of(inputs, **{which: name}))


def test_a_model_without_a_tokenizer(inputs: pico.Inputs, refuse: Refuse, tmp_path: Path) -> None:
    shutil.copytree(inputs.model, tmp_path / "mute")
    for file in (tmp_path / "mute").glob("token*"):
        file.unlink()

    assert "no tokenizer can be loaded from" in refuse(*words_of(inputs, model="./mute"))


def test_an_option_that_is_no_number(inputs: pico.Inputs, refuse: Refuse) -> None:
    line = refuse(*words_of(inputs, method="asvd", option="alpha=nan"))
    assert line == "option 'alpha' of method 'asvd': 'nan' is no number to compute with"


def test_unknown_tasks_are_named_with_the_nearest(
    inputs: pico.Inputs, refuse: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its own tasks take seconds to index; tests/pipeline/test_lm_eval.py looks names up there.
    from lm_eval.tasks import TaskManager

    none = partial(TaskManager, include_defaults=False)
    monkeypatch.setattr("compress_core.hf.lm_eval_find._own_tasks", none)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "easy.yaml").write_text("task: arc_easy\ndataset_path: json\n")
    line = refuse(*words_of(inputs, tasks="arc_eazy", task_path="tasks"))
    assert line.startswith("no lm-eval task is called 'arc_eazy'; nearest: arc_easy")


def test_method_and_methods_together(inputs: pico.Inputs, refuse: Refuse) -> None:
    words = ["plan", *words_of(inputs, method="svd")[1:], "--methods", "svd,asvd"]
    assert refuse(*words) == "give --method for a run or --methods for a sweep, not both"


def test_one_wrong_method_of_a_sweep(inputs: pico.Inputs, refuse: Refuse) -> None:
    words = ["sweep", *words_of(inputs, methods="svd,asvf")[1:]]
    assert refuse(*words).startswith("unknown method 'asvf'. Did you mean 'asvd'?")


def test_a_store_of_a_newer_version(inputs: pico.Inputs, refuse: Refuse, tmp_path: Path) -> None:
    store = tmp_path / "home" / "store"
    store.mkdir(parents=True)
    write_record(store / "FORMAT.json", {"format": 99})

    for words in (words_of(inputs), ["store", "ls", "--home", "home"]):
        line = refuse(*words)
        assert "99" in line and "newer" in line


def test_a_home_that_cannot_be_written(inputs: pico.Inputs, refuse: Refuse, tmp_path: Path) -> None:
    import flows.settings.home  # noqa: F401  while everything can still be read

    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    for home in (locked, locked / "inside"):
        with without_root():
            line = refuse(*words_of(inputs, home=home))
        assert line == (
            f"cannot write to the data directory {home}: Permission denied; "
            "choose another with --home or EIGENPRESS_HOME"
        )


def test_a_tracking_server_that_is_not_there(inputs: pico.Inputs, refuse: Refuse) -> None:
    started = time.perf_counter()
    line = refuse(*words_of(inputs), MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert line.startswith("no MLflow server answers at http://127.0.0.1:9 (")
    assert time.perf_counter() - started < 20


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["export", "dense"], "dense is not a model that eigenpress compressed: nothing to undo"),
        (["export", "none"], "/none"),
        (["export", "dense", "--to", "gguf"], "cannot export to 'gguf'; forms: dense, vllm"),
        (["store", "ls", "--home", "none"], "there is no store at none/store; choose a data dir"),
        (["store", "gc", "--home", "none"], "there is no store at none/store; choose a data dir"),
        (["store", "why", "abcdef", "--home", "home"], "abcdef"),
        (["store", "show", "abc", "--home", "home"], "key 'abc' is too short: give 4 digits"),
    ],
)
def test_other_commands(
    words: list[str], line: str, inputs: pico.Inputs, refuse: Refuse, tmp_path: Path
) -> None:
    shutil.copytree(inputs.model, tmp_path / "dense")
    (tmp_path / "home" / "store").mkdir(parents=True)

    assert line in refuse(*words)
    assert not (tmp_path / "none").exists()
