"""What libraries raise about what a user brought, turned into one line at one place."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from compress_core.errors import CompressError

_PANIC = "PanicException"  # of Rust; no Exception, and no class that can be imported


@contextmanager
def refusing(kind: type[CompressError], what: str, advice: str = "") -> Iterator[None]:
    """Whatever goes wrong inside is raised as ``kind``: "``what``: what the library said".

    Args:
        kind: Error to raise; errors of the core pass as they are.
        what: What was tried, with the file or the record it was tried on.
        advice: What to do, said last.

    Raises:
        CompressError: Of ``kind``, where anything was raised but an order to stop.
    """
    try:
        yield
    except (CompressError, MemoryError, torch.OutOfMemoryError):
        raise  # ours, or nothing that the user brought
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
            raise  # Ctrl-C and the like
        said = f"{what}: {first_line(error)}"
        raise kind(f"{said}; {advice}" if advice else said) from error


def first_line(error: BaseException) -> str:
    """The first line of what an error and its cause say; with its kind where that is needed."""
    said = error.strerror if isinstance(error, OSError) else None  # the path is in `what`
    line = (said or str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    plain = isinstance(error, OSError | ValueError) and not isinstance(error, UnicodeError)
    if type(error).__module__ == "builtins" and not plain and type(error) is not Exception:
        return f"{type(error).__name__}: {line}"
    cause = error.__cause__ and first_line(error.__cause__)
    return f"{line}: {cause}" if cause and cause not in line else line
