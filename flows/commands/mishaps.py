"""What went wrong, in one line: mistakes of the user with code 2, everything else with code 1.

A line of the second kind names stage and unit and a file with the traceback: nobody who compresses
a model has to read one.
"""

import errno
import os
import shlex
import sys
import tempfile
import traceback
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from compress_core.errors import CompressError
from compress_core.secrets import hide
from flows.settings.home import opened_home
from storage.errors import StorageError

MISTAKE, BUG = 2, 1
MOST = 300  # characters of a foreign exception's own words
PLACE = "stage "  # how the note begins that a session leaves on what is raised in it
ADVICE = (
    "take a smaller --batch-size, fewer or shorter windows (--samples, --length) or a machine with "
    "more; `eigenpress plan` says how much is needed, and what is done is kept"
)


def say_mistake(error: BaseException | str) -> int:
    """Writes the line for what the user can mend; the exit code that goes with it."""
    say(" ".join(str(error).split()))
    return MISTAKE


def say_mishap(error: BaseException) -> int:
    """Writes the line for whatever else was raised; the exit code that goes with it."""
    if is_ours(error):
        return say_mistake(str(error))
    kind = type(error).__name__
    words = " ".join(str(error).split())
    first = words if len(words) <= MOST else f"{words[:MOST]} …"
    place = next((n for n in getattr(error, "__notes__", []) if n.startswith(PLACE)), "")
    where = f" ({place})" if place else ""
    log = f"the traceback is in {write_log(error)}"
    if is_out_of_memory(error):
        say(f"out of memory{where}: {ADVICE}; {log}")
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        what = error.filename or "what is printed"
        say(f"the disk is full: cannot write {what}{where}; what is done is kept; {log}")
        return MISTAKE
    else:
        say(f"{kind}: {first or 'without a word'}{where}; {log}")
    return BUG


def say_in_thread(error: BaseException | None) -> None:
    """The same for what is raised in a thread of a library's, beside the command."""
    if isinstance(error, Exception):
        say_mishap(error)


def is_ours(error: BaseException) -> bool:
    """Whether an error was raised on purpose, with a line that says what to do."""
    if isinstance(error, CompressError | StorageError):
        return True
    package = type(error).__module__.partition(".")[0]
    return isinstance(error, RuntimeError) and package in ("flows", "tasks")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, numpy or torch had no memory; torch says so in words on a CPU."""
    words = ("can't allocate memory", "not enough memory", "out of memory")
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and any(w in str(error) for w in words))


def write_log(error: BaseException) -> str:
    """Writes the traceback below the data directory, or where it cannot, a temporary folder.

    Returns:
        The file; where none could be written, words that say so.
    """
    text = "".join(traceback.format_exception(error))
    lines = hide(f"{shlex.join(sys.argv)}\nPython {sys.version}\n\n{text}")
    name = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}.log"
    home = opened_home()
    for folder in ([home / "logs"] if home and home.is_dir() else []) + [
        Path(tempfile.gettempdir())
    ]:
        try:
            folder.mkdir(exist_ok=True)
            file = folder / (name if folder.name == "logs" else f"eigenpress-{name}")
            with file.open("x", encoding="utf-8", errors="backslashreplace") as opened:
                opened.write(lines)
        except OSError:
            continue
        return str(file.absolute())
    return "no file: neither the data directory nor a temporary folder can be written"


def say(line: str, before: str = "") -> None:
    """Writes a line to stderr; where that is closed or full there is nobody to tell."""
    shown = "".join(sign if sign.isprintable() else "?" for sign in hide(line))
    if sys.stderr is not None:
        with suppress(OSError):
            sys.stderr.write(f"{before}eigenpress: {shown}\n")
