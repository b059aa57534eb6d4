"""Who computes: what is refused before anything begins, and which device a process has."""

from pathlib import Path

import pytest
import torch

from compress_core.errors import ConfigError
from flows.settings import checks
from flows.settings.config import RunConfig
from storage.errors import LeaseHeldError
from storage.layout import Layout
from tasks.engine import own_device as devices
from tasks.engine.own_device import own_device

CLUSTER = "tcp://192.0.2.1:8786"


def refusal(**values: object) -> str:
    with pytest.raises(ConfigError) as raised:
        checks.check_runner(RunConfig(**{"model": "m", "kept": 0.5, "device": "cpu"} | values))
    return str(raised.value)


@pytest.mark.parametrize("runner", sorted(checks.EXTRAS))
def test_a_runner_without_its_library(runner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checks.check_runner(RunConfig(model="m", kept=0.5, device="cpu", runner=runner))
    monkeypatch.setitem(checks.EXTRAS, runner, "no_such_library")
    said = refusal(runner=runner)
    assert said == f"--runner {runner} needs no-such-library: pip install 'eigenpress[{runner}]'"


def test_a_cluster_that_cannot_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    assert "run `eigenpress up` or set PREFECT_API_URL" in refusal(runner="dask", cluster=CLUSTER)
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:4200/api")
    checks.check_runner(
        RunConfig(model="m", kept=0.5, device="cpu", runner="dask", cluster=CLUSTER)
    )


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "choose_device", lambda wanted: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    checks.check_runner(RunConfig(model="m", kept=0.5, runner="processes", workers=2))
    assert "and --device auto has 2 here" in refusal(runner="processes", workers=3, device="auto")


def test_every_process_has_a_device_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claims exclude one another within a process, too."""
    monkeypatch.setattr(devices, "_CLAIMS", [])
    layout = Layout(tmp_path)
    assert [own_device("cuda", layout, 2) for _ in range(2)] == ["cuda:0", "cuda:1"]
    with pytest.raises(LeaseHeldError):
        own_device("cuda", layout, 2)
    devices._CLAIMS.pop(0).give_back()
    assert own_device("cuda", layout, 2) == "cuda:0"
    assert [own_device(shared, layout, 0) for shared in ("cpu", "cuda:1")] == ["cpu", "cuda:1"]
    for claim in devices._CLAIMS:
        claim.give_back()
