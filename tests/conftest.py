"""Fixtures shared by all tests: the real models where there are some, and what is dear to make."""

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import hypothesis
import pytest
import torch

from tasks.engine.free_memory import free_memory
from tests import s3_server
from tests.code_cache import code_cache_at
from tests.pipeline import pico

# An example that takes long is no mistake: no test asserts a time.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

NO_RUNS = "no_runs.db"  # Prefect's tables, as they are before a first run
SHARED = Path(__file__).resolve().parents[2] / "shared"
MEMORY, ROOM = Path("/dev/shm"), 8 << 30  # bytes; at its end the suite has 0.6 GB there
TEMPORARY = "PYTEST_DEBUG_TEMPROOT"


def pytest_configure() -> None:
    """Temporary folders lie in memory where that has room: disks are slow to make and to remove
    the small folders of thousands of homes."""
    if TEMPORARY not in os.environ and room_in(MEMORY) > ROOM:
        os.environ[TEMPORARY] = str(MEMORY)


def room_in(memory: Path) -> int:
    """Bytes that files in memory may take; none where there is no such place, or no code runs."""
    try:
        place = os.statvfs(memory)
    except OSError:
        return 0
    if not os.access(memory, os.W_OK) or place.f_flag & os.ST_NOEXEC:
        return 0
    return min(place.f_bavail * place.f_frsize, free_memory("cpu"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long comes first, so that at the end no core waits for it.

    Files with slow tests, then those of the pipeline, then the many short ones.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, item.path.parent.name != "pipeline"))


@pytest.fixture(autouse=True)
def threads_stay() -> Iterator[None]:
    """A test leaves torch as many threads as it found: with others the rest would crawl."""
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before, "the test left torch another number of threads"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the real models beside the repository; tests that need it skip elsewhere."""
    if not (SHARED / "models").is_dir():
        pytest.skip(f"needs the real models in {SHARED}, which this machine does not have")
    return SHARED


@pytest.fixture
def on_disk() -> Iterator[Path]:
    """A folder that does not lie in memory, if this machine's temporary files do not."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder).resolve()


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> pico.Inputs:
    """A pico model and its texts; not to be changed (see `pico.copy_inputs`)."""
    return pico.make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def blank_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with nothing but MLflow's tables, which take seconds to make."""
    from tasks.tracking.speaking import speaking

    home = tmp_path_factory.mktemp("blank") / "home"
    with pico.environment(pico.clean_environment()), speaking(home, "to make its tables"):
        pass
    return home


@pytest.fixture(scope="session")
def server_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which this process speaks to a private Prefect server of its own."""
    from flows.server import runtime

    with pico.environment(pico.clean_environment()):
        runtime.prepare_environment(tmp_path_factory.mktemp("server"))
        runtime.start_early()
        runtime.ready()
        values = dict(os.environ)
    place = Path(values["PREFECT_HOME"])
    with (
        closing(sqlite3.connect(place / "prefect.db")) as tables,
        closing(sqlite3.connect(place / NO_RUNS)) as copy,
    ):
        tables.backup(copy)
    yield values
    with pico.environment(values):
        runtime.stop()


@pytest.fixture(scope="session")
def prepared_home(
    blank_home: Path, server_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """`blank_home` with Prefect's tables too, for commands that start a server of their own.

    Making them takes such a command five seconds; that a command makes them is what tests of fresh
    homes say.
    """
    home = tmp_path_factory.mktemp("prepared") / "home"
    shutil.copytree(blank_home, home)
    (home / "prefect").mkdir()
    made = Path(server_environment["PREFECT_HOME"]) / NO_RUNS
    shutil.copyfile(made, home / "prefect" / "prefect.db")
    return home


@pytest.fixture(scope="session")
def code_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps transformers from copying modelling files into the user's own cache."""
    with code_cache_at(tmp_path_factory.mktemp("modules")):
        yield


@pytest.fixture(scope="session")
def s3() -> Iterator[s3_server.Server]:
    """A server that speaks S3, on loopback."""
    with s3_server.serving() as server:
        yield server
