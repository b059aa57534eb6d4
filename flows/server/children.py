"""Processes that a command starts and ends: on a leash, with a log, in sessions of their own."""

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress_core.errors import ConfigError
from compress_core.secrets import hide

if TYPE_CHECKING:
    import psutil

EXCEPTION = re.compile(r"[\w.]+(Error|Exception|Warning): ")
PR_SET_CHILD_SUBREAPER = 36  # of linux/prctl.h
ORPHANS_SECONDS = 5
SCRIPTS = Path(__file__).parent
LEASHED = str(SCRIPTS / "leashed.py")
LOOPBACK = "127.0.0.1"


def last_words(log: Path, start: int) -> str:
    """The last line of a log from a place on, of those that name an exception if there are any."""
    text = log.read_bytes()[start:].decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if EXCEPTION.match(line)]
    return hide((named or lines or ["it said nothing"])[-1])


def bind(port: int, flag: str, host: str = LOOPBACK) -> socket.socket:
    """A listening socket, there before anything is loaded; port 0 takes any that is free.

    Args:
        port: To listen on.
        flag: Where it was given, for the refusal.
        host: Name or address.

    Raises:
        ConfigError: It is taken, this user may not have it, or there is no such host.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=512)
    except (socket.gaierror, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"--host {host}: {reason}; give a name or an address of this machine"
        ) from None
    except OSError as error:
        reason = os.strerror(error.errno or 0)  # Python adds the address to the system's words
        where = f"{flag} {port}" if host == LOOPBACK else f"--host {host} {flag} {port}"
        raise ConfigError(
            f"{where}: {reason}; end what is there, or give another ({flag} 0 takes any that is "
            "free)"
        ) from None


@dataclass
class Child:
    """A process that was started, and where what it says goes."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    log_start: int

    @property
    def complaint(self) -> str:
        """Why it ended: by which signal, or what its log says last."""
        code = self.process.returncode
        if code is not None and code < 0:
            return f"{self.name} was ended by {signal.Signals(-code).name}; see {self.log}"
        return (
            f"{self.name} ended (exit code {code}): "
            f"{last_words(self.log, self.log_start)} (all of it in {self.log})"
        )

    def end(self, seconds: float) -> None:
        """Ends it and all that it started: in good order, or when the time is over anyhow."""
        import psutil

        family = _family(self.process.pid)
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        for member in {*family, *_family(self.process.pid)}:
            with suppress(psutil.Error):
                member.kill()
        self.process.kill()
        self.process.wait()


def start_child(
    name: str,
    words: list[str],
    log: Path,
    environment: dict[str, str],
    listener: int | None = None,
) -> Child:
    """Starts a script of this package, or below `LEASHED` a module, that ends with this process.

    Args:
        name: For people.
        words: The script, and its arguments behind the parent's process id.
        log: Gets what it prints.
        environment: Its environment.
        listener: A file descriptor that it inherits; it is the argument before the parent's id.
    """
    script, *rest = words
    inherited = [] if listener is None else [listener]
    with log.open("ab") as output:
        process = subprocess.Popen(
            # -P: a folder named `tasks` or `flows` where the user stands must not shadow anything.
            [sys.executable, "-P", script, *map(str, inherited), str(os.getpid()), *rest],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=inherited,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the parent, which still has to record it
        )
        return Child(name, process, log, output.tell())


@contextmanager
def adopting_orphans() -> Iterator["set[psutil.Process]"]:
    """What a child leaves behind becomes a child of this process, where the system can (Linux).

    Yields:
        The children that this process has before, which belong to others.
    """
    import psutil

    prctl = getattr(ctypes.CDLL(None), "prctl", lambda *_: 0)
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield set(psutil.Process().children())
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def end_orphans(known: list[Child], others: "set[psutil.Process]") -> None:
    """Ends what children left behind to this process: a run whose worker was killed.

    Args:
        known: The children that were started.
        others: Those that were there before.
    """
    import psutil

    own = {child.process.pid for child in known}
    found = {child for child in psutil.Process().children() if child.pid not in own}
    left = sorted(found - others, key=lambda process: process.pid)
    for process in [*left, *(below for child in left for below in _family(child.pid))]:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=ORPHANS_SECONDS)


def _family(pid: int) -> "list[psutil.Process]":
    """All that a process has started and that is still there."""
    import psutil

    with suppress(psutil.Error):
        return psutil.Process(pid).children(recursive=True)
    return []
