"""Children that end with their parent, however that ends, and say no password in their logs.

The scripts private.py and leashed.py begin with it, so it imports nothing that takes time.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import IO, Any

WATCH_SECONDS = 0.1  # between looks at the parent
GRACE_SECONDS = 1.5  # from the parent's end: what is not written by then is lost, with the parent


class Leash:
    """Ends this process when its parent is gone, in good order if that is quick.

    It holds from the first line on, through imports and migrations, which take long on a busy
    machine. The last word is the kernel's: a timer that no thread of Python has to notice. A
    migration that it cuts off is one transaction, which SQLite takes back.

    Args:
        parent: Process id of the parent. (A pipe from it would stay open in its forked children,
            and PR_SET_PDEATHSIG would mean the thread that started this process.)

    Attributes:
        end: What ends this process in good order; set it as soon as there is such a thing.
    """

    def __init__(self, parent: int) -> None:
        self.end: Callable[[], None] | None = None
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        threading.Thread(target=self._watch, args=(parent,), daemon=True).start()

    def _watch(self, parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_SECONDS)
        signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS)
        if self.end is None:
            os._exit(0)  # nothing was recorded yet
        self.end()


class WithoutSecrets:
    """A stream for the log, with passwords hidden: libraries name addresses in their errors."""

    def __init__(self, stream: IO[str]) -> None:
        from compress_core.secrets import hide

        self._stream, self._hide = stream, hide

    def write(self, text: str) -> int:
        """As the stream's own."""
        return self._stream.write(self._hide(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
