"""What `serve --follow` makes of versions that cannot take over, without a model or a server."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flows.runs import serve
from tasks.tracking.speaking import TrackingError


def watched(
    monkeypatch: pytest.MonkeyPatch, home: Path, meant: list[int], fail: int
) -> tuple[list[int], list[str]]:
    """Versions started while an alias means these in turn, and what was said.

    Args:
        monkeypatch: Of the test.
        home: An empty data directory.
        meant: What each look finds; 1 is served at first.
        fail: How many versions cannot be had before one can.
    """
    looks: Iterator[int] = iter(meant)
    started: list[int] = []
    said: list[str] = []
    now, failures = 1, fail

    def version() -> Any:
        return SimpleNamespace(name="m", version=now)

    def look(*_: Any) -> Any:
        nonlocal now
        try:
            now = next(looks)
        except StopIteration:
            raise KeyboardInterrupt from None  # nothing else ends it
        return version()

    def find(*_: Any) -> serve.Found:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise TrackingError("busy")
        return serve.Found(home, version())

    async def start(_: Any, found: Any, listener: Any) -> Any:
        listener.close()
        started.append(found.version.version)
        return SimpleNamespace(lives=True, in_flight=1)

    async def run() -> None:
        server = serve._Server(serve.Asked(home, "m@champion", "", 0, "cpu", True), said.append)
        first: Any = SimpleNamespace(backend=SimpleNamespace(lives=True, in_flight=1))
        await server._watch(serve.Found(home, version()), first)

    async def here(function: Any, *words: Any) -> Any:
        return function(*words)

    monkeypatch.setattr(serve, "FOLLOW_SECONDS", 0)
    monkeypatch.setattr(serve, "find_version", look)
    monkeypatch.setattr(serve, "_find", find)
    monkeypatch.setattr(serve._Server, "_start", start)
    monkeypatch.setattr(serve.asyncio, "to_thread", here)
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(run())
    return started, said


def test_a_version_that_could_not_be_had_is_tried_again_and_told_of_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(serve, "RETRY_SECONDS", 0)
    started, said = watched(monkeypatch, tmp_path, [2, 2, 2, 2], fail=2)
    assert started == [2]
    assert [line.split(" is served")[0] for line in said] == ["m version 1", "m version 2"]


def test_the_wait_before_another_try_doubles(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def started(looks: int) -> list[int]:
        seconds = iter(range(0, 1000, 50))  # of the clock, each time it is asked
        clock = SimpleNamespace(monotonic=lambda: next(seconds))
        monkeypatch.setattr(serve, "time", clock)
        return watched(monkeypatch, tmp_path, [2] * looks, fail=2)[0]

    # Tried at 0; not at 50; at 100, until which 60 had to pass; then not before 150 + 120.
    assert started(5) == []
    assert started(6) == [2]


def test_an_alias_that_moves_back_starts_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert watched(monkeypatch, tmp_path, [2, 1, 1], fail=1)[0] == []
    # Moved away again, it is tried at once.
    assert watched(monkeypatch, tmp_path, [2, 1, 2], fail=1)[0] == [2]
