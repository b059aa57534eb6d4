"""One pico model and one cold run, on one Prefect server, for all tests of the pipeline."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.settings.config import RunConfig, SweepConfig
from tests.pipeline import pico

Run = Callable[..., Any]


@pytest.fixture(scope="session")
def run(server_environment: dict[str, str], blank_home: Path) -> Run:
    """Runs settings as the command line does, in this process, and returns the result."""

    def run_settings(settings: dict[str, Any]) -> Any:
        from flows.commands.execute import run_command

        if not (settings["home"] / "mlflow.db").exists():
            settings["home"].mkdir(parents=True, exist_ok=True)
            shutil.copyfile(blank_home / "mlflow.db", settings["home"] / "mlflow.db")
        kind = SweepConfig if "methods" in settings else RunConfig
        with pico.environment(server_environment):
            return run_command(kind(**settings), as_json=True)

    return run_settings


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A data directory that does not exist yet."""
    return tmp_path / "home"


@pytest.fixture(scope="session")
def cold_walk(inputs: pico.Inputs, tmp_path_factory: pytest.TempPathFactory) -> pico.Walk:
    """A walk through all stages in an empty home; look at it, walk on in a `warm_home`."""
    return pico.walk(inputs.settings(tmp_path_factory.mktemp("walk") / "home"))


@pytest.fixture
def warm_home(cold_walk: pico.Walk, home: Path) -> Path:
    """A data directory with the artifacts of `cold_walk`, free to be changed."""
    shutil.copytree(cold_walk.session.store.root, home / "store")
    return home


@pytest.fixture(scope="session")
def cold(run: Run, inputs: pico.Inputs, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The result of a whole run in an empty home."""
    return run(inputs.settings(tmp_path_factory.mktemp("cold") / "home"))


@pytest.fixture(scope="session")
def cold_home(cold: dict[str, Any]) -> Path:
    """Its home; runs may be added."""
    return Path(cold["model_dir"]).parents[1]
