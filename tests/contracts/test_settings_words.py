"""No setting takes a value that can be none: a kind of mistake each, tried on every setting."""

import math
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ByteSize

from compress_core.errors import ConfigError
from flows.settings.checks import check_windows
from flows.settings.config import RunConfig, Settings, SweepConfig, build_config
from flows.settings.reading import read_yaml

LEAST: dict[type[Settings], dict[str, Any]] = {
    RunConfig: {"model": "m", "kept": 0.5},
    SweepConfig: {"model": "m", "kept": [0.5], "methods": ["svd"]},
}
FIELDS = [
    (kind, name) for kind in LEAST for name in kind.model_fields if name not in ("bos", "options")
]
NUMBERS = {int, float, ByteSize}
NO_WORDS = {
    "empty": "",
    "blank": "  ",
    "of two lines": "a\nb",
    "of a bell": "a\x07b",
    "of a null byte": "a\0b",
    "of a byte that is no UTF-8": "a\udcffb",
    "too long a name": "x" * 300,
    "too long in all": "/".join(["d" * 200] * 30),
    "of nobody's home": "~nosuchuser/x",
}
NO_NUMBERS = [math.nan, math.inf, -math.inf, 2**70, -(2**70), 1e300, "1e400", "9" * 5000, -1, True]


def kinds_of(annotation: Any) -> set[Any]:
    """The plain types that an annotation allows."""
    parts = get_args(annotation)
    return set().union(*map(kinds_of, parts)) if parts else {annotation}


def refused(kind: type[Settings], name: str, value: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        build_config(kind, LEAST[kind] | {name: value}, None)
    line = str(caught.value)
    assert name in line or name.replace("_", "-") in line
    assert "\n" not in line and "\0" not in line and len(line) < 600
    return line


@pytest.mark.parametrize("word", NO_WORDS)
@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_a_word_that_is_none(kind: type[Settings], name: str, word: str) -> None:
    many = isinstance(LEAST[kind].get(name), list) or name in ("tasks", "eval_text", "refresh")
    refused(kind, name, [NO_WORDS[word]] if many else NO_WORDS[word])


@pytest.mark.parametrize(
    ("kind", "name"),
    [(k, n) for k, n in FIELDS if kinds_of(k.model_fields[n].annotation) & NUMBERS],
)
def test_a_number_that_is_none(kind: type[Settings], name: str) -> None:
    for number in NO_NUMBERS:
        if name == "target_perplexity" and number in (2**70, 1e300):
            continue  # anything is within it, which is what it says
        refused(kind, name, [number] if name == "kept" and kind is SweepConfig else number)


@pytest.mark.parametrize("value", ["", "a\nb", "x" * 300])
def test_an_option_that_is_none(value: str) -> None:
    for options in ({"update": value}, {value: "u"}):
        refused(RunConfig, "options", options)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("methods", ["svd", "asvd", "svd"]),
        ("kept", [0.5, 0.6, 0.50]),
        ("tasks", ["piqa", "piqa"]),
        ("eval_text", ["a.txt", "./a.txt"]),
        ("refresh", ["collect", "collect"]),
    ],
)
def test_a_value_that_is_there_twice(
    name: str, values: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("words")
    assert "is there twice" in refused(SweepConfig, name, values)


BOMB = "a: &a [x]\n" + "".join(f"b{n}: &b{n} [*a, *a]\n" for n in range(3))
FILES = {
    "a number for a name": ("1: 2\n", "1 is no name of a setting"),
    "a truth for a name": ("true: 2\n", "True is no name of a setting"),
    "nothing for a name": ("null: 2\n", "None is no name of a setting"),
    "a list for a name": ("? [a]\n: 2\n", "unhashable key"),
    "a name twice": ("seed: 1\nseed: 2\n", "found 'seed' twice"),
    "an option twice": ("options:\n  a: 1\n  a: 2\n", "found 'a' twice"),
    "no date": ("seed: 2001-99-99\n", "month must be in 1..12"),
    "no float": ("seed: !!float abc\n", "could not convert string to float"),
    "no int": ("seed: !!int ''\n", "is not YAML"),
    "too many digits": ("seed: 1" + "0" * 5000 + "\n", "Exceeds the limit"),
    "a bomb": (BOMB, "found an alias of more than one value"),
    "a bomb of merges": ("a: &a {x: 1}\nb: {<<: [*a, *a]}\n", "found an alias of more than one"),
    "an alias of itself": ("a: &a [*a]\n", "is not YAML"),
    "nothing but brackets": ("[" * 5000, "nested too deep"),
    "two documents": ("seed: 1\n---\nseed: 2\n", "another document"),
    "a scalar": ("42", "must hold a mapping"),
    "a null byte": ("a: \0", "special characters are not allowed"),
    "more than anybody writes": ("a: " + "x" * (1 << 20), "too many for settings"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_of_settings_that_is_none(case: str, tmp_path: Path) -> None:
    text, message = FILES[case]
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_yaml(tmp_path / "a.yaml")
    line = str(caught.value)
    assert message in line and "a.yaml" in line and "\n" not in line and len(line) < 400


def test_a_file_may_name_one_value_twice(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("calibration: &text a.txt\neval_text: [*text]\n")
    assert read_yaml(tmp_path / "a.yaml") == {"calibration": "a.txt", "eval_text": ["a.txt"]}


def test_a_setting_of_the_other_kind_of_command_says_so() -> None:
    with pytest.raises(ConfigError, match="'report' is a setting of a sweep, which this is not"):
        build_config(RunConfig, LEAST[RunConfig] | {"report": "r"}, None)
    with pytest.raises(ConfigError, match="'output' is a setting of a run, which this is not"):
        build_config(SweepConfig, LEAST[SweepConfig] | {"output": "o"}, None)


@pytest.mark.parametrize("home", ["model", "model/inside", "model/../model"])
def test_a_data_directory_inside_the_model(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    with pytest.raises(ConfigError, match="is inside the model's folder"):
        build_config(RunConfig, {"model": "./model", "kept": 0.5, "home": home}, None)
    assert not list((tmp_path / "model").iterdir())


def test_windows_that_memory_does_not_hold_are_refused_with_their_bytes() -> None:
    check_windows(1000, 2048, 1000 * 2048 * 16)
    with pytest.raises(ConfigError, match="take 32,768,016 bytes of memory, and 32,768,000 are"):
        check_windows(1, 2048001, 32_768_000)
