"""Run as a script: a module of a library as `python -m` runs it, that ends with its parent.

    python -P leashed.py PARENT MODULE ARGUMENT...

What the module starts ends with it: Prefect's worker gives every run a session of its own.
"""

import os
import runpy
import signal
import sys
from contextlib import suppress
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # where this lies, wherever that is
from flows.server.leash import GRACE_SECONDS, Leash, WithoutSecrets


def end_all() -> None:
    """Ends this process and its descendants at once: whom they report to is gone with the parent.

    A signal first would end a module that has no handler before its descendants are dead.
    """
    import psutil

    signal.setitimer(signal.ITIMER_REAL, 0)  # the leash's: it would leave descendants behind
    this = psutil.Process()
    while family := this.children(recursive=True):
        for process in family:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(family, timeout=GRACE_SECONDS)
    os._exit(0)


if __name__ == "__main__":
    Leash(int(sys.argv[1])).end = end_all
    sys.stderr = WithoutSecrets(sys.stderr)
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
