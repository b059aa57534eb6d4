"""The rights of an ordinary user: tests may run as root, to whom nothing is denied."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_root() -> Iterator[None]:
    """The process without the rights of root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
