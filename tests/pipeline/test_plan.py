"""A plan says what a run would compute, and why, and touches nothing."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.commands.plan import plan_as_run_or_sweep
from flows.report.console import Reporter
from flows.runs.estimate import estimate
from flows.runs.forecast import Planned, Planner
from flows.runs.machine import Machine
from flows.runs.opened import open_command
from flows.runs.pipeline import build_pipeline
from flows.runs.workspace import LIBRARIES, open_workspace
from flows.settings.config import RunConfig, SweepConfig
from tests.pipeline import pico

Unit = tuple[str, str]


def plan(settings: dict[str, Any]) -> list[Planned]:
    pipeline, store, _ = pico.build(settings)
    return Planner(store, settings.get("refresh", ())).plan(pipeline)


def units(planned: list[Planned], *states: str) -> set[Unit]:
    return {(unit.stage, unit.unit) for unit in planned if unit.state in states}


def reasons(planned: list[Planned]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for unit in planned:
        if unit.state == "run":
            found.setdefault(unit.stage, set()).add(unit.why)
    return found


def computed(walk: pico.Walk) -> set[Unit]:
    return {(stage, unit) for stage, names in walk.computed.items() for unit in names}


def test_an_empty_home_computes_everything(inputs: pico.Inputs, home: Path) -> None:
    planned = plan(inputs.settings(home))
    assert {unit.state for unit in planned} == {"run"}
    assert {unit.why for unit in planned} == {"not computed before"}
    assert len(planned) == sum(pico.UNITS.values())
    assert list((home / "store").glob("*/*/*/manifest.json")) == []


def test_after_a_run_everything_is_cached_and_nothing_is_touched(
    cold_walk: pico.Walk, inputs: pico.Inputs, warm_home: Path
) -> None:
    before = pico.tree(warm_home / "store")
    planned = plan(inputs.settings(warm_home))
    assert {unit.state for unit in planned} == {"cached"}
    assert [unit.key for unit in planned] == [outcome.key for outcome in cold_walk.outcomes]
    plan(inputs.settings(warm_home, seed=9, kept=0.3))
    assert pico.tree(warm_home / "store") == before


def longer_text(inputs: pico.Inputs) -> None:
    with inputs.calibration.open("a", encoding="utf-8") as file:
        file.write(pico.made_text(3, 100))


def other_layer(inputs: pico.Inputs) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    pico.change_weight(inputs.model, name, lambda weight: weight * 0.5)


def other_setting(inputs: pico.Inputs) -> None:
    file = inputs.model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 1e-3}))


def other_generation(inputs: pico.Inputs) -> None:
    (inputs.model / "generation_config.json").write_text('{"max_new_tokens": 7}')


@pytest.mark.parametrize(
    ("change", "settings", "expected"),
    [
        (None, {"seed": 4}, {"tokenise": {"seed 3 → 4"}}),
        (None, {"kept": 0.4}, {"allocate": {"kept 0.6 → 0.4"}}),
        (None, {"samples": 6}, {"tokenise": {"samples 12 → 6"}}),
        (None, {"products": "float32"}, {"collect": {"products float64 → float32"}}),
        (None, {"refresh": ["weigh"]}, {"weigh": {"--refresh"}}),
        (longer_text, {}, {"tokenise": {"text"}}),
        (other_generation, {}, {"materialise": {"tokenizer and other files"}}),
        (
            other_layer,
            {},
            {
                "collect": {"weights of the block", "weights of earlier blocks"},
                "decompose": {"weight"},
                "materialise": {"dense weights"},
                "evaluate": {"dense model"},
            },
        ),
    ],
)
def test_the_reason_is_named_and_the_run_computes_what_was_planned(
    change: Callable[[pico.Inputs], None] | None,
    settings: dict[str, Any],
    expected: dict[str, set[str]],
    inputs: pico.Inputs,
    warm_home: Path,
    tmp_path: Path,
) -> None:
    changed = pico.copy_inputs(inputs, tmp_path / "changed")
    if change is not None:
        change(changed)
    wanted = changed.settings(warm_home, **settings)
    planned = plan(wanted)
    assert reasons(planned) == expected
    found = computed(pico.walk(wanted))
    assert units(planned, "run") <= found <= units(planned, "run", "waits")
    waiting = [unit for unit in planned if unit.state == "waits"]
    assert all(unit.why.endswith("; reused if that result is unchanged") for unit in waiting)
    assert {unit.state for unit in plan(wanted | {"refresh": []})} == {"cached"}


def test_another_configuration_names_the_architecture(
    inputs: pico.Inputs, warm_home: Path, tmp_path: Path
) -> None:
    changed = pico.copy_inputs(inputs, tmp_path / "changed")
    other_setting(changed)
    found = reasons(plan(changed.settings(warm_home)))
    assert found["collect"] == {"architecture"}
    assert "decompose" not in found


def test_a_lost_artifact_is_planned(inputs: pico.Inputs, warm_home: Path) -> None:
    layer = "model.layers.2.mlp.up_proj"
    folder = pico.artifact_folder(warm_home / "store", "decompose", layer)
    (folder / "arrays/v/c.0.0").unlink()
    planned = plan(inputs.settings(warm_home))
    assert units(planned, "run") == {("decompose", layer)}
    assert reasons(planned) == {"decompose": {"its artifact is damaged or incomplete"}}
    shutil.rmtree(folder)
    assert units(plan(inputs.settings(warm_home)), "run") == {("decompose", layer)}


def sweep_settings(inputs: pico.Inputs, home: Path) -> dict[str, Any]:
    settings = inputs.settings(home, methods=["svd", "asvd", "svd_llm"], kept=[0.8, 0.4])
    return settings


@pytest.mark.parametrize("warm", [False, True])
def test_a_sweep_lists_what_runs_share_once(
    warm: bool, inputs: pico.Inputs, home: Path, warm_home: Path
) -> None:
    config = SweepConfig(**sweep_settings(inputs, warm_home if warm else home / "other"))
    workspace = open_workspace(config)
    planner = Planner(workspace.store)
    runs = [planner.groups(build_pipeline(workspace, run)) for run in config.runs()]
    planned = [unit for run in runs for units in run.values() for unit in units]
    stages = [unit.stage for unit in planned]
    assert stages.count("tokenise") == pico.UNITS["tokenise"]
    assert stages.count("collect") == pico.UNITS["collect"]
    assert stages.count("weigh") == 2 * pico.UNITS["weigh"]
    assert stages.count("decompose") == 3 * pico.UNITS["decompose"]
    assert stages.count("allocate") == 2
    assert stages.count("realise") == 6 * pico.UNITS["realise"]
    assert stages.count("evaluate") == 1 + 6
    expected = estimate(runs, workspace)
    assert expected.seconds > 0 and expected.memory > 0 and expected.disk > 0


def test_the_command_takes_the_flags_of_run_and_of_sweep(
    inputs: pico.Inputs, warm_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed: list[Any] = []
    given = inputs.settings(warm_home)
    plan_as_run_or_sweep(given, None, False, printed.append)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"0 of {sum(pico.UNITS.values())} units to run"
    assert lines[0].split()[:3] == ["tokenise", "cached", "2"]
    plan_as_run_or_sweep(given | {"seed": 4}, None, False, printed.append)
    text = capsys.readouterr().out
    assert "seed 3 → 4" in text and "MB at most beyond the libraries" in " ".join(text.split())
    plan_as_run_or_sweep(sweep_settings(inputs, warm_home), None, True, printed.append)
    assert capsys.readouterr().out == ""
    assert set(printed[0]) == {"units", "estimate", "notes", "predicted"}
    json.dumps(printed[0])


def planned_with(given: dict[str, Any]) -> dict[str, Any]:
    printed: list[Any] = []
    plan_as_run_or_sweep(given, None, True, printed.append)
    return dict(printed[0]["estimate"])


def test_a_plan_knows_how_many_compute(
    inputs: pico.Inputs, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the same speed with any number of threads, several processes are sooner done."""
    sample = Machine({"float32": 1e7, "float64": 1e7}, 1e7, 1e6, 1e8, 1e8, "")
    asked: list[int | None] = []

    def known(home: Path, device: str, dtypes: list[str], threads: int | None = None) -> Machine:
        asked.append(threads)
        return sample

    monkeypatch.setattr("flows.runs.estimate.known_machine", known)
    monkeypatch.setattr("torch.get_num_threads", lambda: 4)
    here = planned_with(inputs.settings(home))
    assert (here["workers"], set(asked)) == (1, {4})
    assert here["seconds"] == pytest.approx(here["alone"])
    assert here["alone"] == pytest.approx(sum(here["stages"].values()))
    assert here["together"] == here["memory"] + LIBRARIES
    found = {}
    for count in (1, 2, 4):
        found[count] = planned_with(inputs.settings(home, runner="processes", workers=count))
    assert set(asked) == {4, 2, 1}  # what is not of a strand has a share of them
    assert [one["workers"] for one in found.values()] == [1, 2, 4]
    assert {one["alone"] for one in found.values()} == {here["alone"]}
    assert found[1]["seconds"] == pytest.approx(here["seconds"])
    assert here["seconds"] / 2 < found[2]["seconds"] < here["seconds"]
    for count, one in found.items():
        assert one["memory"] + count * LIBRARIES <= one["together"]
        assert one["together"] <= count * (one["memory"] + LIBRARIES)


def test_a_sweep_of_several_processes_is_one_run_after_another(
    inputs: pico.Inputs, home: Path
) -> None:
    more = {"runner": "processes", "workers": 2}
    both = planned_with(sweep_settings(inputs, home) | more)
    assert both["alone"] / 2 <= both["seconds"]
    first = planned_with(inputs.settings(home, method="svd", kept=0.8) | more)
    assert first["seconds"] < both["seconds"]


@pytest.mark.parametrize("memory", [None, 2 * LIBRARIES + 2_000_000])
def test_what_is_planned_of_a_process_is_what_it_is_sent(
    memory: int | None, inputs: pico.Inputs, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches and what goes by way of the disk are of its share of the memory."""
    monkeypatch.setattr("flows.runs.workspace.free_memory", lambda device: LIBRARIES + 4_000_000)
    monkeypatch.setattr("flows.runs.opened.free_memory", lambda device: LIBRARIES + 4_000_000)
    more = {"runner": "processes", "workers": 2, "memory": memory, "samples": 12}
    opened = open_command(RunConfig(**inputs.settings(home, **more)), Reporter(quiet=True))
    sent = opened._sent
    own = open_workspace(sent.model_copy(update={"batch_size": "auto"}))
    assert own.batch_size == sent.batch_size == opened.workspace.batch_size
    assert own.model.room.most == opened.workspace.model.room.most
    one = open_workspace(RunConfig(**inputs.settings(home, memory=memory)))
    assert sent.batch_size < one.batch_size


def test_a_plan_of_several_processes_says_so(
    inputs: pico.Inputs, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"runner": "processes", "workers": 2, "memory": 4 * LIBRARIES}
    plan_as_run_or_sweep(inputs.settings(home, **more), None, False, print)
    words = " ".join(capsys.readouterr().out.split())
    found = r"time about \S+ s with 2 processes, their start aside \(\S+ s in one\), if the machine"
    assert re.search(found, words)
    assert re.search(r"MB at most a process beyond the libraries \(\w+\), 1,6\d\d MB of all", words)
    assert "1,600 MB allowed a process in all" in words
