"""A walk in a process of its own that kills itself, as `kill -9` does, at a chosen moment.

One interpreter imports everything once and forks for each walk, before it has computed anything
or started a thread.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from tempfile import NamedTemporaryFile
from typing import Any

from storage.fingerprint import read_sources
from storage.source import parse_module
from tasks.engine.code import PACKAGES
from tests.pipeline import pico


def serve() -> None:
    """For each line (settings, stage, unit, when, note) forks a walk, and answers its exit code."""
    import transformers.models.llama.modeling_llama  # noqa: F401  or each walk imports it

    for package in PACKAGES:  # or each walk, whose keys hang on it, parses the code
        for name, *file in read_sources(package):
            _ = parse_module(name, *file).hashes
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os.dup2(2, 1)
            _walk(*json.loads(line))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _walk(settings: Mapping[str, Any], stage: str, unit: str, when: str, note: str) -> None:
    from storage.draft import Draft

    commit = Draft.commit

    def halting(self: Draft) -> None:
        hit = self.stage == stage and self.unit == unit
        if hit and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        commit(self)
        with open(note, "a", encoding="utf-8") as file:
            file.write(json.dumps([self.stage, self.unit]) + "\n")
        if hit:
            os.kill(os.getpid(), signal.SIGKILL)

    Draft.commit = halting  # type: ignore[method-assign]
    pico.walk(settings)


@cache
def _server() -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", "from tests.pipeline.halting import serve; serve()"],
        cwd=pico.ROOT,
        env=pico.clean_environment(PYTHONPATH=str(pico.ROOT)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(process.communicate)  # closes its stdin, which ends it
    return process


def halt(settings: Mapping[str, Any], stage: str, unit: str, when: str) -> list[tuple[str, str]]:
    """Walks until the artifact of a unit is about to be committed ("before") or just was ("after").

    Nothing of that process has a chance to clean up.

    Returns:
        (stage, unit) of every artifact that it had committed, in order; not of scratch.
    """
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    with NamedTemporaryFile("r", encoding="utf-8") as note:
        asked = [dict(settings), stage, unit, when, note.name]
        server.stdin.write(json.dumps(asked, default=str) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert int(answer) == -signal.SIGKILL, f"the walk ended with {answer or 'its server'}"
        made = [json.loads(line) for line in note]
    return [(stage, unit) for stage, unit in made if stage != "scratch"]
