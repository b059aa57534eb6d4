"""Stores to hold leases in, and processes that hold them, for the tests of leases."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from flows.runs.stores import open_store
from storage.bucket_leases import BucketLeases
from storage.errors import LeaseHeldError
from storage.keys import recipe_key
from storage.store import Store
from tests.contracts.buckets import Faulty, recipe

STAGE = "weigh"
NEVER = 1e6  # seconds between two turns
OPEN = """
import os, sys
from pathlib import Path
from flows.runs.stores import open_store
home, address, stage, *keys = sys.argv[1:]
store = open_store(Path(home), address or None, print)
"""
HOLD = f"""{OPEN}
with store.claim(stage, keys):
    print("held", flush=True)
    sys.stdin.read()
"""
HOLD_AND_FORK = f"""{OPEN}
try:
    with store.claim(stage, keys):
        child = os.fork() == 0
        if not child:
            sys.stdin.read()
finally:
    print("left", flush=True)
    sys.stdin.read()
"""
"""A forked child leaves the block and lives on; its parent stays in it."""


@dataclass(frozen=True)
class Place:
    """Where stores are.

    Attributes:
        folder: of all machines.
        address: of the bucket that they share; None where all are one machine.
    """

    folder: Path
    address: str | None = None

    def home(self, machine: str) -> Path:
        return self.folder / ("a" if self.address is None else machine)

    def open(self, machine: str = "a") -> Store:
        return open_store(self.home(machine), self.address, pytest.fail)

    @contextmanager
    def process(
        self, script: str, keys: Sequence[str], machine: str = "a"
    ) -> Iterator[subprocess.Popen[str]]:
        """Another process that has said its first word; it is killed at the end."""
        words = [str(self.home(machine)), self.address or "", STAGE, *keys]
        with subprocess.Popen(
            [sys.executable, "-c", script, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            try:
                assert process.stdout.readline() in ("held\n", "left\n")
                yield process
            finally:
                process.kill()


def key_of(name: str) -> str:
    return recipe_key(recipe(name))


X, Y, Z = sorted(map(key_of, "xyz"))


def is_held(store: Store, *keys: str) -> bool:
    """Whether somebody holds one of them; nothing is held afterwards that was not before."""
    try:
        with store.claim(STAGE, keys):
            return False
    except LeaseHeldError:
        return True


class Clock:
    """Stands still unless it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Machines:
    """Hosts that share a bucket and, for the test's sake, a clock."""

    def __init__(self) -> None:
        self.objects = Faulty()
        self.clock = Clock()

    def leases(self, host: str, turn: float = NEVER) -> BucketLeases:
        return BucketLeases(self.objects, self.clock, host, turn)


def holds(leases: BucketLeases, *keys: str) -> bool:
    """Whether these keys can be had; they are given back at once."""
    try:
        with leases.claim(STAGE, keys):
            return True
    except LeaseHeldError:
        return False
