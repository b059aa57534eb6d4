"""A walk in a process of its own that kills itself, as `kill -9` does, at a chosen moment."""

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from tests.pipeline import pico

HALT = """
import os, signal, sys
stage, unit, when = sys.argv[1:4]
sys.argv[1:] = sys.argv[4:]
from storage.draft import Draft
commit = Draft.commit

def halting(draft):
    hit = draft.stage == stage and draft.unit == unit
    if hit and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    commit(draft)
    if hit:
        os.kill(os.getpid(), signal.SIGKILL)

Draft.commit = halting
import json
from tests.pipeline import pico
pico.walk(json.loads(sys.argv[1]))
"""


def halt(settings: Mapping[str, Any], stage: str, unit: str, when: str) -> None:
    """Walks until the artifact of a unit is about to be committed ("before") or just was ("after").

    Nothing of that process has a chance to clean up.
    """
    process = subprocess.run(
        [sys.executable, "-c", HALT, stage, unit, when, json.dumps(dict(settings), default=str)],
        cwd=pico.ROOT,
        env=pico.clean_environment(PYTHONPATH=str(pico.ROOT)),
        capture_output=True,
        timeout=300,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
