"""Whatever escapes is one line with stage and unit, and a log that holds the traceback."""

import errno
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.commands import cli, mishaps
from flows.settings.home import use_home
from storage.store import Store
from tasks.engine.session import Session
from tasks.engine.units import Unit
from tasks.engine.work import Group, Work
from tests.pipeline import pico

Call = Callable[..., tuple[int, str, str]]


class OutOfMemoryError(RuntimeError):
    """Called as torch's own."""


def full(*file: str) -> OSError:
    return OSError(errno.ENOSPC, "No space left on device", *file)


MISHAPS: dict[str, tuple[BaseException, int, str]] = {
    "a library's": (
        RuntimeError("size of tensor a\nmust match"),
        1,
        "RuntimeError: size of tensor",
    ),
    "of no words": (AssertionError(), 1, "AssertionError: without a word; "),
    "of a key": (KeyError("model.embed_tokens.weight"), 1, "KeyError: 'model.embed_tokens.weight'"),
    "of an index": (IndexError("index out of range in self"), 1, "IndexError: index out of range"),
    "of very many words": (ValueError("word " * 9999), 1, "ValueError: word word "),
    "with an escape": (ValueError("\x1b[31mred\udcff"), 1, "ValueError: ?[31mred?"),
    "of a file": (
        PermissionError(errno.EACCES, "no", "f"),
        1,
        "PermissionError: [Errno 13] no: 'f'",
    ),
    "of a full disk": (full("digests.json"), 2, "the disk is full: cannot write digests.json"),
    "of a full stdout": (full(), 2, "the disk is full: cannot write what is printed"),
    "of recursion": (RecursionError("maximum depth"), 1, "RecursionError: maximum depth"),
    "of a module": (
        ModuleNotFoundError("No module named 'x'"),
        1,
        "ModuleNotFoundError: No module",
    ),
    "no memory": (MemoryError(), 1, "out of memory: take a smaller --batch-size"),
    "no memory of a device": (OutOfMemoryError("CUDA"), 1, "out of memory: take a smaller --batch"),
    "no memory in torch's words": (
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        1,
        "out of memory: take a smaller --batch-size",
    ),
}


@pytest.mark.parametrize("mishap", MISHAPS)
def test_whatever_is_raised_is_one_line_that_names_a_log(
    mishap: str, call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    error, expected, words = MISHAPS[mishap]

    def broken(settings: Any, as_json: bool) -> None:
        (tmp_path / "home").mkdir()
        use_home(tmp_path / "home")
        raise error

    monkeypatch.setattr(cli, "execute", broken)
    code, out, err = call("run", "--model", "m", "--kept", "0.5", "--json")
    assert (code, out) == (expected, "")
    assert err.startswith(f"eigenpress: {words}") and err.count("\n") == 1 and len(err) < 800
    found = re.search(r"the traceback is in (\S+)$", err.strip())
    assert found is not None and Path(found[1]).parent == tmp_path / "home" / "logs"
    log = Path(found[1]).read_text()
    assert "Traceback (most recent call last)" in log and "in broken" in log
    assert "run --model m --kept 0.5 --json" in log


def test_a_log_goes_elsewhere_where_there_is_no_data_directory(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("early")

    monkeypatch.setattr(cli, "execute", broken)
    monkeypatch.setattr(mishaps, "opened_home", lambda: tmp_path / "none")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    _, _, err = call("run", "--model", "m", "--kept", "0.5")
    assert str(tmp_path / "eigenpress-") in err and not (tmp_path / "none").exists()

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone" / "too"))
    code, _, err = call("run", "--model", "m", "--kept", "0.5")
    assert code == 1 and "no file: neither the data directory nor" in err


@pytest.mark.parametrize(
    "address", ["https://me:hunter2@host/x", "foo://me:hunter2@host", "s3://hunter2@h"]
)
def test_no_password_is_in_a_line_or_a_log(
    address: str, call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: Any) -> None:
        raise OSError(f"cannot reach {address}")

    monkeypatch.setattr(cli, "execute", broken)
    monkeypatch.setattr(mishaps, "opened_home", lambda: tmp_path)
    _, _, err = call("run", "--model", address, "--kept", "0.5")
    (log,) = (tmp_path / "logs").iterdir()
    assert "cannot reach" in err and "cannot reach" in log.read_text()
    assert "hunter2" not in err + log.read_text()


@pytest.mark.parametrize("opened", [False, True])
def test_a_session_says_stage_and_unit_of_whatever_is_raised_in_it(
    opened: bool, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.engine.units.fingerprint", lambda code: {})
    units = [Unit("decompose", f"layer {number}", settings={"n": number}) for number in range(3)]

    def compute(work: Work) -> None:
        for unit in work.missing:
            if unit.name == "layer 1" and not opened:
                raise ZeroDivisionError
            with work.draft(unit) as draft:
                if unit.name == "layer 1":
                    raise ZeroDivisionError
                draft.attrs["done"] = True

    with pytest.raises(ZeroDivisionError) as raised:
        Session(store).run(Group("decompose", "block 0", units, compute))
    later = "" if opened else " or later"
    assert raised.value.__notes__ == [f"stage decompose, block 0, layer 1{later}"]


def test_the_line_has_the_place(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    error = ZeroDivisionError("division by zero")
    error.add_note("a library's note")
    error.add_note("stage collect, block 3")
    assert mishaps.say_mishap(error) == 1
    err = capsys.readouterr().err
    assert err.startswith(
        "eigenpress: ZeroDivisionError: division by zero (stage collect, block 3)"
    )


def command(words: str, tmp_path: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        f"{shlex.join(pico.arguments('', {}))} {words}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=pico.clean_environment(PYTHONPATH=str(pico.ROOT), TMPDIR=str(tmp_path)),
        check=False,
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("words", "lines"),
    [
        ("--help | true", 0),
        ("run --help | head -1", 0),
        ("--version >&-", 0),
        ("rum 2>/dev/full", 0),
        ("rum >&- 2>&-", 0),
        ("--help > /dev/full", 1),
        ("--version > /dev/full", 1),
    ],
)
def test_where_nobody_reads_there_is_no_traceback(words: str, lines: int, tmp_path: Path) -> None:
    done = command(words, tmp_path)
    assert done.stderr.count("\n") == lines
    assert "Traceback" not in done.stderr + done.stdout and "Exception ignored" not in done.stderr
