"""A tokenizer that does not parse, or is another model's, is one line; stages are not named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress_core.errors import CompressError, ModelError, NumericsError, TextError
from compress_core.hf.text import load_tokenizer
from flows.runs.workspace import open_workspace, read_texts
from flows.settings.config import RunConfig
from storage.store import Store
from tasks.engine.session import Session
from tasks.engine.stages import STAGES
from tasks.engine.units import Unit
from tasks.engine.work import Group, Work
from tests.pipeline import pico

FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
Change = Callable[[dict[str, Any]], Any]


def with_vocabulary(change: Callable[[dict[str, int]], Any]) -> Change:
    return lambda t: {**t, "model": {**t["model"], "vocab": change(t["model"]["vocab"])}}


TOKENIZERS: dict[str, Change] = {
    "cut short": lambda t: json.dumps(t)[:2000],
    "empty": lambda t: "",
    "no object": lambda t: [],
    "a number": lambda t: 5,
    "another type": lambda t: {**t, "model": 5},
    "no model": lambda t: {name: value for name, value in t.items() if name != "model"},
    "a list of tokens": with_vocabulary(list),
    "tokens without numbers": with_vocabulary(lambda v: dict.fromkeys(v, "x")),
    "merges of nothing": lambda t: {**t, "model": {**t["model"], "merges": [["zz", "qq"]]}},
    "added tokens": lambda t: {**t, "added_tokens": "x"},
    "a broken pattern": lambda t: {
        **t,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": "("},
            "behavior": "Isolated",
            "invert": False,
        },
    },
}
CONFIGS: dict[str, object] = {
    "broken": "{",
    "a list": [],
    "a number": 5,
    "null": None,
    "a class of no kind": {"tokenizer_class": 7},
    "a token of no kind": {**FAST, "bos_token": 5},
    "added tokens": {**FAST, "added_tokens_decoder": [1]},
    "a length of no kind": {**FAST, "model_max_length": "x"},
}


@pytest.fixture
def refused(inputs: pico.Inputs, tmp_path: Path) -> Callable[..., str]:
    """What a run with changed files is refused with."""
    copy = pico.copy_inputs(inputs, tmp_path / "copy")

    def run(**files: object) -> str:
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (copy.model / f"{name}.json").write_text(text)
        with pytest.raises((ModelError, TextError)) as caught:
            workspace = open_workspace(RunConfig(**copy.settings(tmp_path / "home")))
            read_texts(workspace, needs_calibration=True)
        message = str(caught.value)
        assert "\n" not in message
        assert not any(f"stage {stage}" in message for stage in STAGES)
        return message

    return run


def tokenizer_of(inputs: pico.Inputs) -> dict[str, Any]:
    made: dict[str, Any] = json.loads((inputs.model / "tokenizer.json").read_text())
    return made


@pytest.mark.parametrize("damage", TOKENIZERS)
def test_a_tokenizer_that_does_not_parse(
    damage: str, inputs: pico.Inputs, refused: Callable[..., str]
) -> None:
    line = refused(tokenizer=TOKENIZERS[damage](tokenizer_of(inputs)))
    assert "tokenizer.json" in line or line.startswith("no tokenizer can be loaded from ")


@pytest.mark.parametrize("damage", CONFIGS)
def test_a_tokenizer_config_that_does_not_parse(damage: str, refused: Callable[..., str]) -> None:
    assert "tokenizer" in refused(tokenizer_config=CONFIGS[damage])


def test_a_folder_in_a_tokenizers_place(
    inputs: pico.Inputs, refused: Callable[..., str], tmp_path: Path
) -> None:
    file = tmp_path / "copy" / "pico" / "tokenizer.json"
    file.unlink()
    file.mkdir()
    assert refused().endswith("tokenizer.json cannot be read: Is a directory; fetch it again")


def test_a_folder_without_a_tokenizer(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "copy" / "pico" / "tokenizer.json").unlink()
    assert "pico: it has none; put its files there (tokenizer.json" in refused()


def test_the_tokenizer_of_another_model(inputs: pico.Inputs, refused: Callable[..., str]) -> None:
    made = tokenizer_of(inputs)
    rows = len(made["model"]["vocab"])
    shifted = {token: i + (1000 if i > 99 else 0) for token, i in made["model"]["vocab"].items()}
    line = refused(tokenizer=with_vocabulary(lambda _: shifted)(made))
    assert "on calibration text " in line
    assert f"and the model's embedding ends at {rows - 1}: the tokenizer belongs to" in line


@pytest.mark.parametrize("kind", [TextError, ModelError, NumericsError])
def test_only_numbers_that_fail_say_their_stage(kind: type[CompressError], store: Store) -> None:
    unit = Unit("tokenise", "x", settings={})

    def refuse(work: Work) -> None:
        raise kind("so it is")

    # Any code of ours; what a unit's is has to be found in the packages.
    refuse.__module__, refuse.__qualname__ = load_tokenizer.__module__, load_tokenizer.__qualname__
    group = Group("tokenise", "calibration", [unit], refuse)
    with pytest.raises(kind) as caught:
        Session(store).run(group)
    prefix = "stage tokenise, calibration: " if kind is NumericsError else ""
    assert str(caught.value) == prefix + "so it is"
