"""`eigenpress store`: what people see of the store, and that freeing keeps what is needed."""

import json
import shutil
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from compress_core.errors import ConfigError
from flows.commands.store import store_app
from storage.errors import ArtifactMissingError, StorageError, StoreInUseError
from storage.records import read_record, write_record
from tests.patience import PATIENCE
from tests.pipeline import pico
from tests.pipeline.conftest import Run

TOTAL = sum(pico.UNITS.values())


def call(home: Path, *words: str) -> Result:
    with pico.environment(pico.clean_environment()):
        return CliRunner().invoke(store_app, [*words, "--home", str(home)], catch_exceptions=False)


def key_of(walk: pico.Walk, stage: str, unit: str) -> str:
    return next(o.key for o in walk.outcomes if (o.stage, o.unit) == (stage, unit))


def test_ls_lists_artifacts(cold_walk: pico.Walk, warm_home: Path) -> None:
    lines = call(warm_home, "ls", "--all").stdout.splitlines()
    assert len(lines) == TOTAL + 2  # a heading for what no recorded run made
    assert lines[-1].startswith(f"{TOTAL} artifacts, ")
    few = call(warm_home, "ls", "--limit", "5").stdout.splitlines()
    assert few[:6] == lines[:1] + lines[1:6]
    assert few[6].endswith("the newest 5 are shown, --all shows every one")
    assert max(len(line) for line in lines) <= 80
    rows = json.loads(call(warm_home, "ls", "--json", "--stage", "weigh").stdout)
    assert {row["key"] for row in rows} == {o.key for o in cold_walk.outcomes if o.stage == "weigh"}


def test_show_prints_the_manifest(cold_walk: pico.Walk, warm_home: Path) -> None:
    key = key_of(cold_walk, "allocate", "model")
    shown = json.loads(call(warm_home, "show", key[:10]).stdout)
    assert (shown["key"], shown["recipe"]["settings"]["kept"]) == (key, 0.6)


def test_why_shows_settings_code_and_lineage(cold_walk: pico.Walk, warm_home: Path) -> None:
    layer = "model.layers.1.self_attn.k_proj"
    text = call(warm_home, "why", key_of(cold_walk, "decompose", layer)[:12]).stdout
    assert f"decompose · {layer}" in text
    assert "source   weight = xxh3:" in text
    assert "compress_core.decompose" in text
    tap = "model.layers.1.self_attn.q_proj"
    for stage, unit in (("weigh", tap), ("collect", tap), ("tokenise", "calibration")):
        assert f"{key_of(cold_walk, stage, unit)[:12]}  {stage} · {unit}" in text
    deep = call(warm_home, "why", key_of(cold_walk, "materialise", "model")).stdout
    assert sum(" decompose · " in line for line in deep.splitlines()) == pico.UNITS["decompose"]


def test_why_names_what_changed(inputs: pico.Inputs, warm_home: Path) -> None:
    later = pico.walk(inputs.settings(warm_home, kept=0.4))
    text = call(warm_home, "why", key_of(later, "allocate", "model")).stdout
    assert "changed kept 0.6 → 0.4" in text


def test_why_reports_an_input_that_is_gone(cold_walk: pico.Walk, warm_home: Path) -> None:
    layer = "model.layers.0.mlp.up_proj"
    shutil.rmtree(pico.artifact_folder(warm_home / "store", "decompose", layer))
    text = call(warm_home, "why", key_of(cold_walk, "realise", layer)).stdout
    assert f"{key_of(cold_walk, 'decompose', layer)[:12]}  missing" in text


@pytest.mark.parametrize("what", ["arrays/gram/c.0", "manifest.json"])
def test_verify_finds_damage_wherever_it_is(what: str, warm_home: Path) -> None:
    sound = call(warm_home, "verify")
    assert (sound.exit_code, sound.stdout) == (0, f"{TOTAL} artifacts checked, 0 problems\n")
    tap = "model.layers.0.mlp.down_proj"
    file = pico.artifact_folder(warm_home / "store", "collect", tap) / what
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    damaged = call(warm_home, "verify")
    assert damaged.exit_code == 1
    assert damaged.stdout.endswith(" 1 problems\n")


def test_no_store_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no store"):
        call(tmp_path / "nowhere", "ls")


LATER = timedelta(days=30)


class Later(datetime):
    """The clock of somebody who looks at the store a month from now."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> "Later":
        return cls.fromtimestamp((datetime.now(tz) + LATER).timestamp(), tz)


@pytest.fixture(scope="module")
def used(
    run: Run,
    inputs: pico.Inputs,
    cold_walk: pico.Walk,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, Any]]:
    """A home with a run registered a month ago, one of today, and a walk that nobody knows of."""
    home = tmp_path_factory.mktemp("used") / "home"
    shutil.copytree(cold_walk.session.store.root, home / "store")
    old = run(inputs.settings(home))
    known = set((home / "runs").glob("*.json"))
    recent = run(inputs.settings(home, method="svd", kept=0.4))
    (file,) = set((home / "runs").glob("*.json")) - known
    today = (datetime.now(UTC) + LATER).isoformat()
    write_record(file, {**read_record(file), "created": today})
    unknown = pico.walk(inputs.settings(home, seed=9))
    return home, {"old": old, "recent": recent, "unknown": unknown}


@pytest.fixture
def used_home(
    used: tuple[Path, dict[str, Any]], home: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """What became of the runs in a copy of that home, at ``home``, a month later."""
    made, found = used
    shutil.copytree(made, home)
    monkeypatch.setattr("flows.runs.free.datetime", Later)
    return found


def freed(result: Result) -> set[str]:
    return {line.split()[0] for line in result.stdout.splitlines()[:-1]}


def test_gc_frees_what_no_registered_model_and_no_recent_run_reaches(
    used_home: dict[str, Any], inputs: pico.Inputs, home: Path
) -> None:
    needed = {s["key"] for name in ("old", "recent") for s in used_home[name]["stages"]}
    unknown = {outcome.key for outcome in used_home["unknown"].outcomes} - needed
    before = pico.tree(home / "store")
    dry = call(home, "gc", "--dry-run")
    assert freed(dry) == {key[:12] for key in unknown}
    assert dry.stdout.splitlines()[-1].startswith("would free ")
    assert pico.tree(home / "store") == before
    wet = call(home, "gc")
    assert freed(wet) == freed(dry)
    assert wet.stdout.splitlines()[-1].startswith("freed ")
    assert freed(call(home, "gc")) == set()
    for settings in ({}, {"method": "svd", "kept": 0.4}):
        assert pico.walk(inputs.settings(home, **settings)).computed == {}


def test_gc_keeps_what_a_stopped_run_has_made(
    inputs: pico.Inputs, warm_home: Path, cold_walk: pico.Walk
) -> None:
    kept = call(warm_home, "gc", "--recent-days", "0.5").stdout
    assert kept.endswith(f"{TOTAL} artifacts stay\n")
    assert pico.walk(inputs.settings(warm_home)).computed == {}
    freed_all = call(warm_home, "gc", "--dry-run", "--recent-days", "0").stdout
    assert freed_all.endswith("; 0 artifacts stay\n")


def test_gc_lets_go_of_runs_whose_versions_were_deleted(
    used_home: dict[str, Any], home: Path
) -> None:
    from tasks.tracking.speaking import speaking

    with pico.environment(pico.clean_environment()):
        with speaking(home, "to delete") as client:
            client.delete_registered_model("pico")
        found = freed(call(home, "gc", "--dry-run", "--recent-days", "7"))
    recent = {s["key"][:12] for s in used_home["recent"]["stages"]}
    old = {s["key"][:12] for s in used_home["old"]["stages"] if s["name"] != "register"}
    assert old - recent <= found
    assert not recent & found


def test_gc_frees_nothing_while_a_run_goes_on(
    run: Run, inputs: pico.Inputs, warm_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def collect_in_the_middle(*folder: object, **settings: object) -> None:
        with pytest.raises(StoreInUseError, match=r"^nothing was freed: a run works"):
            call(warm_home, "gc")
        assert "would free" in call(warm_home, "gc", "--dry-run").stdout
        refused.append(True)

    refused: list[bool] = []
    monkeypatch.setattr("flows.runs.run.check_loads", collect_in_the_middle)
    run(inputs.settings(warm_home))
    assert refused == [True]
    assert call(warm_home, "gc").stdout.splitlines()[-1].startswith("freed ")


def test_ls_groups_by_the_runs_that_made_artifacts_newest_first(
    used_home: dict[str, Any], home: Path
) -> None:
    rows = json.loads(call(home, "ls", "--json").stdout)
    runs = [row["run"] for row in rows]
    order = ["svd kept 0.4", "svd_llm kept 0.6", None]
    assert [run for run in dict.fromkeys(runs)] == order
    for run in order:
        times = [row["created"] for row in rows if row["run"] == run]
        assert times == sorted(times, reverse=True)
    made = {s["key"] for s in used_home["recent"]["stages"] if s["state"] == "computed"}
    assert made >= {row["key"] for row in rows if row["run"] == "svd kept 0.4"}
    (heading, *_) = call(home, "ls", "--limit", "1").stdout.splitlines()
    assert heading.startswith("pico · svd kept 0.4 · 20")


def flip(text: bytes) -> bytes:
    return text.replace(b'"key": "', b'"key": "f', 1)


@pytest.mark.parametrize(
    "harm",
    [lambda text: b"", lambda text: text[:-9], lambda text: b"[]", lambda text: b"{}", flip],
    ids=["empty", "cut", "list", "blank", "key"],
)
def test_gc_frees_nothing_beside_a_damaged_record_of_a_run(
    used_home: dict[str, Any], home: Path, harm: Any
) -> None:
    file = max((home / "runs").glob("*.json"))
    file.write_bytes(harm(file.read_bytes()))
    before = pico.tree(home / "store")
    with pytest.raises(StorageError, match=rf"nothing was freed: .*{file.name} is damaged.*delete"):
        call(home, "gc")
    assert pico.tree(home / "store") == before


@pytest.mark.parametrize("days", ["nan", "inf", "-inf", "-5", "-0.001"])
def test_gc_refuses_days_that_are_none(warm_home: Path, days: str) -> None:
    with pytest.raises(ConfigError, match="--recent-days is a number of days, 0 or more"):
        call(warm_home, "gc", "--recent-days", days)


@pytest.mark.parametrize(("stage", "hint"), [("decompse", "mean 'decompose'"), ("x", "stages: ")])
def test_ls_refuses_a_stage_that_there_is_not(warm_home: Path, stage: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=f"no stage '{stage}'.*{hint}"):
        call(warm_home, "ls", "--stage", stage)


@pytest.mark.parametrize(
    ("key", "message"),
    [("", "too short"), ("abc", "too short"), ("zzzz", "0-9 and a-f"), ("f" * 64, "no key starts")],
)
@pytest.mark.parametrize("command", ["show", "why"])
def test_a_key_that_is_none_is_refused(
    warm_home: Path, command: str, key: str, message: str
) -> None:
    with pytest.raises(ArtifactMissingError, match=message):
        call(warm_home, command, key)


def test_every_command_speaks_json(cold_walk: pico.Walk, warm_home: Path) -> None:
    key = key_of(cold_walk, "materialise", "model")
    why = json.loads(call(warm_home, "why", key, "--json").stdout)
    assert len([m for m in why["made_from"] if m["stage"] == "decompose"]) == 21
    assert json.loads(call(warm_home, "show", key, "--json").stdout)["key"] == key
    checked = json.loads(call(warm_home, "verify", "--json").stdout)
    assert checked == {"checked": TOTAL, "problems": []}
    freed = json.loads(call(warm_home, "gc", "--dry-run", "--recent-days", "0", "--json").stdout)
    assert (len(freed["removed"]), freed["kept"]) == (TOTAL, 0)


@pytest.mark.parametrize(
    "place",
    ["note.txt", "weigh/note.txt", "weigh/zz/x", "index/note.txt", "Models/x", "weigh/ff/short/x"],
)
def test_verify_says_what_does_not_belong_into_the_store(warm_home: Path, place: str) -> None:
    stray = warm_home / "store" / place
    stray.parent.mkdir(parents=True, exist_ok=True)
    stray.write_text("x")
    found = call(warm_home, "verify")
    assert found.exit_code == 1
    assert "does not belong into the store" in found.stdout
    assert found.stdout.endswith(f"{TOTAL} artifacts checked, 1 problems\n")


def test_gc_works_beside_a_damaged_artifact(
    used_home: dict[str, Any], inputs: pico.Inputs, home: Path
) -> None:
    folder = home / "store/allocate"
    file = next(
        f
        for s in used_home["old"]["stages"]
        if s["name"] == "allocate"
        for f in folder.glob(f"*/{s['key']}/manifest.json")
    )
    file.write_text(file.read_text()[:-9])
    assert call(home, "gc").stdout.splitlines()[-1].startswith("freed ")
    assert pico.walk(inputs.settings(home)).computed == {"allocate": {"model"}}


def test_a_mistake_is_one_line_in_a_shell(tmp_path: Path) -> None:
    process = pico.start(pico.arguments("store ls", {"home": tmp_path / "none"}), tmp_path)
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out, err.count("\n")) == (2, "", 1)
