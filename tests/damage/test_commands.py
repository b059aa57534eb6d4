"""Two hundred command lines that nobody means: carried out, or one line that says what is wrong."""

import contextlib
import json
import random
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import ByteSize

from flows.commands import cli
from flows.server import runtime
from flows.settings.config import RunConfig, SweepConfig
from tests.damage.nonsense import VALUES
from tests.pipeline import pico

TRIES, SEED, HANGS_AFTER = 200, 13, 60
COMMANDS = ("run", "plan", "plan", "sweep", "store", "methods", "export")
NO_SETTINGS = ("- a\n- b\n", "7", "", "a: [", "1: 2\n", "? [a]\n: b\n", "\t:", "a: &a [*a]")
STORE = ("ls", "show", "why", "verify", "gc")


class Begun(BaseException):
    """A flow would start now: everything was accepted."""


@pytest.fixture(scope="module")
def inputs_of(tmp_path_factory: pytest.TempPathFactory) -> pico.Inputs:
    """One block, so that a plan takes a moment."""
    folder = tmp_path_factory.mktemp("inputs")
    return pico.make_inputs(folder, config=partial(pico.llama, blocks=1))


@pytest.fixture
def no_flow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Where a flow would start the command ends; where one hangs the test does."""

    def begin(*_: object) -> None:
        raise Begun

    def hang(*_: object) -> None:
        raise TimeoutError(f"still at it after {HANGS_AFTER} seconds")

    monkeypatch.setattr(runtime, "flow_settings", begin)
    monkeypatch.setattr(runtime, "start_early", lambda: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(HANGS_AFTER)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def settings_of(command: str, inputs: pico.Inputs, home: Path) -> dict[str, Any]:
    """A good run, plan or sweep."""
    settings = inputs.settings(home, samples=2, length=32, eval_windows=2)
    settings = {name: _plain(value) for name, value in settings.items()}
    if command == "sweep":
        del settings["method"]
        settings |= {"methods": ["svd", "svd_llm"], "kept": [0.8, 0.6]}
    return settings


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def every_setting(command: str) -> dict[str, Any]:
    """What `run` or `sweep` can be asked for, and of which type."""
    fields = (SweepConfig if command == "sweep" else RunConfig).model_fields
    return {name: field.annotation for name, field in sorted(fields.items())}


def spoilt(settings: dict[str, Any], command: str, chance: random.Random) -> dict[str, Any]:
    """The settings with one to three of them made nonsense of, or gone."""
    settings, fields = dict(settings), every_setting(command)
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        name = chance.choice([*settings, *fields])
        if chance.random() < 0.15:
            settings.pop(name, None)
        else:
            settings[name] = chance.choice(fitting(fields[name]) or VALUES)
    if settings.get("home") == "/":  # which root may write
        settings["home"] = "/proc"
    return settings


def fitting(annotation: Any) -> list[Any]:
    """The values that get past the first look: those of a type that the setting has."""
    kinds = {annotation, *get_args(annotation)}
    kinds |= {str} if kinds & {Path, ByteSize} else {int} if float in kinds else set()
    return [value for value in VALUES if type(value) in kinds]


def words_of(command: str, settings: dict[str, Any]) -> list[str]:
    """A command line; what argv cannot hold is left out."""
    words = [command]
    for name, value in settings.items():
        if "\0" not in str(value):
            flag = "--option" if name == "options" else "--" + name.replace("_", "-")
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            words += [flag, text]
    return words


def file_words(command: str, settings: dict[str, Any], chance: random.Random) -> list[str]:
    """The same in a YAML file, which may be damaged itself."""
    text = yaml.safe_dump(settings, allow_unicode=True)
    kind = chance.randrange(6)
    if kind == 0:
        text = text[: chance.randrange(len(text))]
    elif kind == 1:
        text = chance.choice(NO_SETTINGS)
    file = Path("settings.yaml")
    file.write_text(text, encoding="utf-8")
    return [command, "--config", str(file)]


def other_words(command: str, home: Path, chance: random.Random) -> list[str]:
    """`store`, `methods` and `export` with words that may mean something."""
    value = str(chance.choice(VALUES)).replace("\0", "")
    value = "/proc" if value == "/" else value  # root may write there
    if command == "export":
        return ["export", value, *chance.choice([[], ["--output", value], ["--to", value]])]
    if command == "methods":
        return ["methods", *chance.choice([[], ["--json"], [value], ["--" + value]])]
    verb = chance.choice(STORE)
    more = chance.choice([[], [value], ["--stage", value], ["--recent-days", value], ["--json"]])
    return ["store", verb, *more, "--home", chance.choice([str(home), value])]


@pytest.mark.parametrize("number", range(TRIES))
def test_a_command_line(
    number: int,
    inputs_of: pico.Inputs,
    no_flow: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chance = random.Random(SEED * 1000 + number)
    command, home = chance.choice(COMMANDS), tmp_path / "home"
    if command in ("store", "methods", "export"):
        words = other_words(command, home, chance)
    else:
        settings = spoilt(settings_of(command, inputs_of, home), command, chance)
        as_file = chance.random() < 0.4
        words = file_words(command, settings, chance) if as_file else words_of(command, settings)
    monkeypatch.setattr(sys, "argv", ["eigenpress", *words])
    capsys.readouterr()
    begun, code = False, 0
    with pico.environment(pico.clean_environment(HF_HUB_OFFLINE="1", HOME=str(tmp_path))):
        try:
            cli.main()
        except Begun:
            begun = True
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0
    said = capsys.readouterr()
    assert "Traceback" not in said.err, words
    if not begun and code:
        assert code == 2, (words, said.err)
        last = said.err.rstrip("\n").split("\n")[-1]
        assert last.startswith("eigenpress: "), words
        assert len(last) > len("eigenpress: ")
    elif "--json" in words:
        json.loads(said.out)
    left = {path.name for path in Path.cwd().iterdir()} - {"settings.yaml"}
    assert left <= asked_for(words), words


def asked_for(words: list[str]) -> set[str]:
    """Names in the working directory that the command line or its file gives."""
    given = [word for word in words if not word.startswith("--")]  # "-inf" may be one
    if "--config" in words:
        with contextlib.suppress(yaml.YAMLError):
            settings = yaml.safe_load(Path("settings.yaml").read_text(encoding="utf-8"))
            given += map(str, settings.values() if isinstance(settings, dict) else [])
    return {path.parts[0] for path in map(Path, given) if path.parts}
