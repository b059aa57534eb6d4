"""Run as a script: a module of a library as `python -m` runs it, that ends with its parent.

    python -P leashed.py PARENT MODULE ARGUMENT...

What the module starts ends with it: Prefect's worker gives every run a session of its own.
"""

import os
import runpy
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # where this lies, wherever that is
from flows.server.leash import GRACE_SECONDS, Leash, WithoutSecrets


def end_all() -> None:
    """Asks this process to end, and kills it and its descendants when the grace is over."""
    import psutil

    signal.setitimer(signal.ITIMER_REAL, 2 * GRACE_SECONDS)
    family = psutil.Process().children(recursive=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    for process in {*family, *psutil.Process().children(recursive=True)}:
        with suppress(psutil.Error):
            process.kill()
    os._exit(0)


if __name__ == "__main__":
    Leash(int(sys.argv[1])).end = end_all
    sys.stderr = WithoutSecrets(sys.stderr)
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
