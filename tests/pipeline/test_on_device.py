"""Every stage runs where it is told to: nothing stays on the CPU that an accelerator would miss."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tasks.engine.stages import STAGES
from tests.pipeline import on_device, pico

NOT_ON_DEVICE = {"train", "register", "weigh"}  # the demonstration's; MLflow's; not of these runs


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process with the simulated device printed."""
    words = [sys.executable, "-m", "tests.pipeline.on_device", str(tmp_path_factory.mktemp("on"))]
    environment = pico.clean_environment(PYTHONPATH=str(pico.ROOT))
    done = subprocess.run(words, cwd=pico.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_every_stage_runs_on_it(said: dict[str, Any]) -> None:
    assert said["ran"] == dict.fromkeys(on_device.WAYS, True)
    assert set(said["stages"]) >= set(STAGES) - NOT_ON_DEVICE


@pytest.mark.parametrize("name", on_device.MISTAKES)
def test_a_planted_mistake_is_found_in_its_stage(name: str, said: dict[str, Any]) -> None:
    _, stage, _, _ = on_device.MISTAKES[name]
    assert "on cpu among those of sim" in said["found"][name], name
    assert f"stage {stage}" in said["found"][name]
