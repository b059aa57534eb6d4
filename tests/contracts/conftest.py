"""An empty store, and ways to call the command line in this process."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.commands import cli
from flows.server import runtime
from storage.store import Store
from tests.pipeline import pico

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def problems() -> list[str]:
    """What the store said was wrong."""
    return []


@pytest.fixture
def store(tmp_path: Path, problems: list[str]) -> Store:
    """An empty store."""
    return Store(tmp_path / "store", on_problem=problems.append)


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Call:
    """Runs a command line in this process, in an empty folder, with every flow forbidden."""

    def forbidden() -> None:
        pytest.fail("a flow was started")

    monkeypatch.setattr(runtime, "flow_settings", forbidden)
    monkeypatch.setattr(runtime, "start_early", lambda: None)
    monkeypatch.chdir(tmp_path)

    def run(*words: object, **environment: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["eigenpress", *map(str, words)])
        capsys.readouterr()
        quiet = pico.clean_environment(HF_HUB_OFFLINE="1", **environment)
        with pico.environment(quiet), pytest.raises(SystemExit) as ended:
            cli.main()
        output = capsys.readouterr()
        code = ended.value.code
        return code if isinstance(code, int) else 0, output.out, output.err

    return run


@pytest.fixture
def refuse(call: Call) -> Callable[..., str]:
    """The one line that a command line is refused with."""

    def run(*words: object, **environment: str) -> str:
        code, out, err = call(*words, **environment)
        assert (code, out) == (2, "")
        assert err.startswith("eigenpress: ") and err.endswith("\n") and err.count("\n") == 1
        return err.removeprefix("eigenpress: ").strip()

    return run
