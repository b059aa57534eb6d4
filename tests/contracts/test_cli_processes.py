"""What needs a process of its own: a full disk, a terminal."""

import os
import pty
import re
import select
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.pipeline import pico


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of four megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


STAGES = (
    *("tokenise", "collect", "weigh", "decompose", "allocate", "realise", "materialise"),
    *("evaluate", "register"),
)


@pytest.mark.slow
def test_a_full_disk_loses_nothing_and_a_terminal_is_left_clean(
    inputs: pico.Inputs, small_disk: Path, tmp_path: Path, prepared_home: Path
) -> None:
    """Two facts of one pair of commands: a command of its own costs twenty seconds."""
    home = tmp_path / "home"
    shutil.copytree(prepared_home, home)
    (small_disk / "store").mkdir()
    (home / "store").symlink_to(small_disk / "store")
    filler = small_disk / "filler"
    room = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    filler.write_bytes(b"\0" * (room - 350_000))
    words = pico.arguments("run", inputs.settings(home, samples=32, length=64))

    full = subprocess.run(words, capture_output=True, text=True, env=environment(), cwd=tmp_path)
    lines = full.stderr.strip().splitlines()
    assert full.returncode == 2
    assert len(lines) == 1 and lines[0].startswith("eigenpress: ") and "disk full" in lines[0]
    there = len(list((home / "store").rglob("manifest.json")))
    assert there > 0

    filler.unlink()
    code, printed = in_terminal(words, environment(), tmp_path)
    assert code == 0, printed
    left = expect_clean(printed)
    stages = {line.split()[0]: line for line in left[: len(STAGES)]}
    assert tuple(stages) == STAGES
    cached = sum(int(count) for count in re.findall(r"(\d+) cached", "".join(stages.values())))
    assert 0 < cached <= there and "computed" in stages["collect"]
    entries = [line.split()[0] for line in left[len(STAGES) :]]
    wanted = ["kept", "perplexity", "model", "registered"]
    assert [word for word in entries if word in wanted] == wanted


def expect_clean(printed: str) -> list[str]:
    """There was a bar, and nothing of it is left, nor a hidden cursor; the lines that are left."""
    assert "━" in printed
    assert printed.rfind("\x1b[?25h") > printed.rfind("\x1b[?25l")  # the cursor is back
    left = [line for line in screen(printed) if line]
    assert not any("━" in line for line in left)
    return left


def environment(**more: str) -> dict[str, str]:
    return pico.clean_environment(PYTHONPATH=str(pico.ROOT), **more)


def in_terminal(words: list[str], variables: Mapping[str, str], folder: Path) -> tuple[int, str]:
    """Runs a command line in a terminal of 100 columns; its exit code and all that it printed."""
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(folder)
        os.execve(words[0], words, {**variables, "COLUMNS": "100", "TERM": "xterm-256color"})
    printed = b""
    while True:
        select.select([terminal], [], [], 60)
        try:
            part = os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        printed += part
    _, status = os.waitpid(process, 0)
    os.close(terminal)
    return os.waitstatus_to_exitcode(status), printed.decode()


def screen(printed: str) -> list[str]:
    """The lines that stay on a terminal: colours left out, moves of the cursor obeyed."""
    lines, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", printed):
        if token == "\n":
            row += 1
            if row == len(lines):
                lines.append("")
            column = 0
        elif token == "\r":
            column = 0
        elif token.endswith("A"):
            row -= int(token[2:-1] or 1)
        elif token.endswith("2K"):
            lines[row] = ""
        elif not token.startswith("\x1b"):
            lines[row] = lines[row][:column] + token + lines[row][column + len(token) :]
            column += len(token)
    return [line.rstrip() for line in lines]
