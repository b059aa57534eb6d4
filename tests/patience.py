"""How long the tests wait for what has to happen once."""

import subprocess
import time
import urllib.request
from collections.abc import Callable
from typing import Any

# Seconds. Only a test that fails waits them, so they are many: a run that takes twenty seconds on a
# quiet machine of two cores has taken more than three hundred where other work ran beside it.
PATIENCE = 1800.0


def wait_for(
    what: Callable[[], Any], every: float = 0.1, of: subprocess.Popen[Any] | None = None
) -> Any:
    """The first answer that is something.

    Args:
        what: Is asked until it answers.
        every: Seconds between two questions.
        of: The process that brings it about.

    Raises:
        AssertionError: No answer came, or the process ended without one.
    """
    end = time.monotonic() + PATIENCE
    while not (found := what()):
        assert of is None or of.poll() is None, of.communicate()
        assert time.monotonic() < end, f"nothing came of {what}"
        time.sleep(every)
    return found


def is_answered(address: str) -> bool:
    """Whether an address is answered with anything that is no error."""
    try:
        urllib.request.urlopen(address, timeout=5).close()
    except OSError:
        return False
    return True
