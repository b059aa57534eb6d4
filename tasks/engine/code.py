"""Which code decides a unit's numbers: objects of it, and through them everything they reach."""

from collections.abc import Iterable
from functools import cache
from typing import Any

from storage.fingerprint import code_fingerprint

PACKAGES = ("compress_core", "tasks")
CLOSED = ("tasks.engine", "tasks.tracking")
"""They run units and tell of them, and compute nothing that is kept."""


def name_of(code: Any) -> str:
    """Dotted name of the top-level definition that an object is, or is an instance or part of.

    Args:
        code: A function, a class, a bound method, an instance of a class, or what a function
            defined inside itself.
    """
    owner = getattr(code, "__self__", None)
    if owner is not None:
        code = owner
    if not hasattr(code, "__qualname__"):
        code = type(code)
    return f"{code.__module__}.{code.__qualname__.partition('.')[0]}"


def fingerprint(code: Iterable[Any]) -> dict[str, str]:
    """Dotted name to hash of every definition that the objects reach.

    Raises:
        StorageError: An object that is not of our packages, or not of their top level.
    """
    return _fingerprint(tuple(sorted({name_of(part) for part in code})))


@cache  # sources do not change while a process runs
def _fingerprint(names: tuple[str, ...]) -> dict[str, str]:
    return code_fingerprint(names, PACKAGES, CLOSED)
