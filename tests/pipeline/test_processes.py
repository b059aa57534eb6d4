"""Runs in processes of their own: killed at any moment, and two at once on one data directory."""

import json
import os
import shutil
import signal
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from flows.settings.config import RunConfig
from flows.settings.reading import write_yaml
from storage.gc import collect_garbage
from tasks.engine.session import Session
from tasks.engine.work import Group
from tasks.engine.writer import MOST
from tests.patience import PATIENCE, wait_for
from tests.pipeline import pico
from tests.pipeline.conftest import Run
from tests.pipeline.forking import run_script
from tests.pipeline.halting import halt


@pytest.mark.parametrize(
    ("stage", "unit", "when"),
    [
        ("collect", "model.layers.1.mlp.gate_proj", "before"),
        ("collect", "model.layers.1", "before"),
        ("scratch", "hidden states into block 2", "before"),
        ("collect", f"model.layers.{pico.BLOCKS - 1}.mlp.down_proj", "after"),
        ("decompose", "model.layers.1.mlp.up_proj", "before"),
    ],
)
def test_killed_at_any_moment_the_same_command_goes_on(
    stage: str, unit: str, when: str, cold_walk: pico.Walk, inputs: pico.Inputs, home: Path
) -> None:
    settings, store = inputs.settings(home), home / "store"
    halt(settings, stage, unit, when)
    hidden = {folder.name for folder in pico.scratch_left(store)}
    done = {file.parent.name for file in store.glob("*/*/*/manifest.json")} - hidden
    assert len(done) > pico.UNITS["tokenise"]
    found = pico.walk(settings)
    assert {o.key for o in found.outcomes if o.state == "cached"} == done
    assert (found.digests, found.problems) == (cold_walk.digests, [])
    assert pico.payload(store) == pico.payload(cold_walk.session.store.root)
    assert pico.scratch_left(store) == []
    orphans = sorted((store / "tmp").iterdir())
    at_least = 1 if when == "before" else 0  # of what waited behind it, and was being written
    assert at_least <= len(orphans) <= MOST + 1
    report = collect_garbage(found.session.store, {o.key for o in found.outcomes}, dry_run=False)
    assert (report.removed, report.orphans) == ([], orphans)
    assert list((store / "tmp").iterdir()) == []


def test_a_killed_command_is_repeated(
    run: Run, cold_walk: pico.Walk, inputs: pico.Inputs, prepared_home: Path, tmp_path: Path
) -> None:
    """By the clock and not by the unit: wherever `kill -9` finds it."""
    shutil.copytree(prepared_home, tmp_path / "home")
    settings = inputs.settings(tmp_path / "home")
    store = tmp_path / "home" / "store"
    process = pico.start([*pico.arguments("run", settings), "--json"], tmp_path)
    wait_for(lambda: len(list(store.glob("decompose/*/*/manifest.json"))) >= 3, 0.01, process)
    process.kill()
    process.communicate()
    assert not list(store.glob("realise/*/*"))
    done = {file.parent.name for file in store.glob("*/*/*/manifest.json")}
    result = run(settings)
    stages = [stage for stage in result["stages"] if stage["name"] != "register"]
    assert {stage["key"] for stage in stages if stage["state"] == "cached"} == done
    computed = pico.counts(result["stages"], "computed")
    assert not {"tokenise", "collect", "weigh"} & set(computed)
    assert computed["decompose"] <= pico.UNITS["decompose"] - 3
    assert [stage["key"] for stage in stages] == [outcome.key for outcome in cold_walk.outcomes]
    assert pico.payload(store) == pico.payload(cold_walk.session.store.root)


@pytest.fixture(scope="module")
def used_home(
    cold_walk: pico.Walk, prepared_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A home for several commands: what they have in common is made once."""
    home = tmp_path_factory.mktemp("used") / "home"
    shutil.copytree(prepared_home, home)
    shutil.copytree(cold_walk.session.store.root, home / "store")
    return home


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_training_that_would_take_days_ends_when_it_is_told_to(
    sent: signal.Signals, inputs: pico.Inputs, used_home: Path, tmp_path: Path
) -> None:
    if signal.getsignal(sent) is signal.SIG_IGN:
        pytest.skip("the tests run in the background of a shell, which has Ctrl-C ignored")
    settings = inputs.settings(used_home, method="soco:phase1=10000000")
    shutil.rmtree(used_home / "store" / "teacher", ignore_errors=True)
    process = pico.start(pico.arguments("run", settings), tmp_path)
    made = (used_home / "store").glob
    wait_for(lambda: list(made("teacher/*/*/manifest.json")), 0.05, process)
    process.send_signal(sent)
    try:
        _, errors = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == (130 if sent == signal.SIGINT else -sent)
    if sent == signal.SIGINT:
        assert "interrupted; the same command goes on from here" in errors


def test_two_commands_at_once_on_a_fresh_home(inputs: pico.Inputs, tmp_path: Path) -> None:
    """One of them has two processes. What either prints is one JSON value, whatever is logged."""
    home = tmp_path / "home"
    words = [*pico.arguments("run", inputs.settings(home, length=4096)), "--json"]
    noisy = {"PREFECT_LOGGING_LEVEL": "DEBUG", "PYTHONWARNINGS": "always"}
    several = ["--runner", "processes", "--workers", "2"]
    processes = [pico.start([*words, *more], tmp_path, **noisy) for more in ([], several)]
    first, second = (pico.finish(process)[0] for process in processes)
    assert any("the model's context ends there" in note for note in first["notes"])

    def keys(result: dict[str, Any]) -> list[tuple[str, str]]:
        stages = [stage for stage in result["stages"] if stage["name"] != "register"]
        return [(stage["unit"], stage["key"]) for stage in stages]

    assert keys(first) == keys(second)
    states = [{stage["key"]: stage["state"] for stage in one["stages"]} for one in (first, second)]
    by_whom = Counter(key for one in states for key, state in one.items() if state == "computed")
    assert all(by_whom[key] == 1 for _, key in keys(first))
    assert first["metrics"] == second["metrics"]
    assert first["model_dir"] == second["model_dir"]
    assert {first["registered"]["version"], second["registered"]["version"]} == {1, 2}
    assert pico.scratch_left(home / "store") == []
    assert list((home / "store" / "tmp").iterdir()) == []
    assert os.listdir(home / "models") == [Path(first["model_dir"]).name]
    with closing(sqlite3.connect(home / "prefect" / "prefect.db")) as database:
        tasks = [name for (name,) in database.execute("SELECT state_type FROM task_run")]
        flows = [name for (name,) in database.execute("SELECT state_name FROM flow_run")]
    groups = 2 + 3 * pico.BLOCKS + 1 + pico.BLOCKS + 1 + 2 + 1
    assert set(tasks) == {"COMPLETED"}
    assert groups < len(tasks) <= 2 * groups  # groups of a strand that are sent are one task
    assert flows == ["Completed"] * 2
    assert pico.walk(inputs.settings(home, length=4096)).computed == {}


WORKER = """
import json, sys
from flows.report.console import Reporter
from flows.runs.opened import open_command
from flows.settings.config import RunConfig, build_config
from pathlib import Path
for file, number in zip(sys.argv[1::2], map(int, sys.argv[2::2])):
    opened = open_command(build_config(RunConfig, {}, Path(file)), Reporter(quiet=True))
    session, (pipeline,) = opened.session(), opened.pipelines
    found = [session.run(group) for group in pipeline.groups[: number + 1]]
    print(json.dumps([[outcome.state for outcome in outcomes] for outcomes in found]))
"""


def test_a_groups_work_is_named_by_configuration_and_number(
    inputs: pico.Inputs, cold_walk: pico.Walk, tmp_path: Path
) -> None:
    """A process that has the store and the configuration alone does it, and gives the same."""
    words: list[object] = []
    asked: list[tuple[Session, Group]] = []
    for stage in ("collect", "decompose", "realise"):
        home = tmp_path / stage / "home"
        shutil.copytree(cold_walk.session.store.root, home / "store")
        shutil.rmtree(home / "store" / stage)
        settings = inputs.settings(home)
        pipeline, store, _ = pico.build(settings)
        number = [group.stage for group in pipeline.groups].index(stage)
        session = Session(store)
        for group in pipeline.groups[:number]:
            session.run(group)
        write_yaml(RunConfig(**settings), tmp_path / stage / "run.yaml")
        words += [tmp_path / stage / "run.yaml", number]
        asked.append((session, pipeline.groups[number]))
    out = run_script(WORKER, *words, folder=tmp_path, path=[pico.ROOT])
    for line, (session, group) in zip(out.splitlines(), asked, strict=True):
        *before, own = json.loads(line)
        assert {state for states in before for state in states} <= {"cached"}
        assert set(own) == {"computed"}
        for outcome in session.run(group):
            assert outcome.state == "cached"
            assert outcome.key == cold_walk.keys[outcome.stage, outcome.unit]
