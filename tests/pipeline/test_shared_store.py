"""A pico run whose store is a bucket: its folder may be lost, and other machines go on from it."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import obstore
import pytest
from typer.testing import CliRunner, Result

from flows.commands.store import store_app
from flows.runs.forecast import Planner
from flows.runs.free import keys_of_others
from storage.bucket_store import BucketStore
from storage.errors import StorageError
from tests.pipeline import pico
from tests.pipeline.conftest import Run
from tests.s3_server import BUCKET, Server

TOTAL = sum(pico.UNITS.values())


@dataclass(frozen=True)
class Shared:
    """A bucket with the artifacts of one walk."""

    address: str
    walk: pico.Walk
    server: Server

    def call(self, home: Path, *words: str) -> Result:
        with pico.environment(pico.clean_environment(**self.server.environment)):
            found = [*words, "--home", str(home), "--store", self.address]
            return CliRunner().invoke(store_app, found, catch_exceptions=False)


@pytest.fixture(scope="module")
def environment(s3: Server) -> Iterator[None]:
    with pico.environment(pico.clean_environment(**s3.environment)):
        yield


@pytest.fixture(scope="module")
def shared(
    s3: Server, environment: None, inputs: pico.Inputs, tmp_path_factory: pytest.TempPathFactory
) -> Shared:
    address = s3.address()
    home = tmp_path_factory.mktemp("one") / "home"
    walk = pico.walk(inputs.settings(home, store=address))
    assert sum(map(len, walk.computed.values())) == TOTAL
    return Shared(address, walk, s3)


def test_a_walk_without_its_folder_is_all_hits(
    shared: Shared, inputs: pico.Inputs, home: Path, cold_walk: pico.Walk
) -> None:
    again = pico.walk(inputs.settings(home, store=shared.address))
    assert again.computed == {} and again.problems == []
    assert again.digests == shared.walk.digests == cold_walk.digests
    assert pico.tree(again.folder) == pico.tree(cold_walk.folder)
    shutil.rmtree(home / "store")
    assert pico.walk(inputs.settings(home, store=shared.address)).computed == {}


def test_another_budget_begins_where_budgets_differ(
    shared: Shared, inputs: pico.Inputs, home: Path
) -> None:
    found = pico.walk(inputs.settings(home, store=shared.address, kept=0.4)).computed
    assert {"collect", "weigh", "decompose"} & set(found) == set()
    assert "allocate" in found


def test_a_plan_on_an_empty_disk_knows_what_is_cached(
    shared: Shared, inputs: pico.Inputs, home: Path
) -> None:
    pipeline, store, _ = pico.build(inputs.settings(home, store=shared.address))
    planned = Planner(store).plan(pipeline)
    assert {unit.state for unit in planned} == {"cached"}
    here = {stage for stage, _, _ in store.layout.artifacts()}
    assert here <= {"allocate"}  # of which keys hold a part


def test_one_damaged_object_costs_one_unit(
    s3: Server, environment: None, inputs: pico.Inputs, home: Path, tmp_path: Path, shared: Shared
) -> None:
    layer = "model.layers.1.mlp.up_proj"
    key = shared.walk.keys["decompose", layer]
    (name,) = [n for n in s3.names(shared.address) if n.startswith(f"payload/decompose/{key}/")]
    s3.corrupt(shared.address, name)
    checked = shared.call(tmp_path / "elsewhere", "verify")
    assert checked.exit_code == 1 and checked.stdout.endswith(" 1 problems\n")
    again = pico.walk(inputs.settings(home, store=shared.address))
    assert again.computed == {"decompose": {layer}}
    assert again.digests == shared.walk.digests
    assert len(again.problems) == 1 and again.problems[0].startswith("decompose ")
    sound = shared.call(tmp_path / "elsewhere", "verify")
    assert (sound.exit_code, sound.stdout.endswith(" 0 problems\n")) == (0, True)


def test_store_commands_answer_for_the_bucket(shared: Shared, tmp_path: Path) -> None:
    key = shared.walk.keys["allocate", "model"]
    home = tmp_path / "elsewhere"
    rows = json.loads(shared.call(home, "ls", "--json", "--stage", "weigh").stdout)
    assert {row["key"] for row in rows} == {
        key for (stage, _), key in shared.walk.keys.items() if stage == "weigh"
    }
    assert json.loads(shared.call(home, "show", key[:12]).stdout)["key"] == key
    folder = shared.walk.keys["materialise", "model"]
    why = json.loads(shared.call(home, "why", folder, "--json").stdout)
    assert len([m for m in why["made_from"] if m["stage"] == "decompose"]) == 21
    freed = json.loads(shared.call(home, "gc", "--recent-days", "0", "--json").stdout)
    assert (freed["removed"], freed["bucket"]["removed"]) == ([], [])  # put there today
    assert freed["bucket"]["kept"] >= TOTAL


def test_a_run_tells_the_bucket_what_it_used_and_no_secret(
    shared: Shared, run: Run, server_environment: dict[str, str], inputs: pico.Inputs, home: Path
) -> None:
    server_environment.update(shared.server.environment)
    try:
        result = run(inputs.settings(home, store=shared.address))
    finally:
        for name in shared.server.environment:
            server_environment.pop(name)
    states = {stage["state"] for stage in result["stages"] if stage["name"] != "register"}
    assert states == {"cached"}
    (record,) = (home / "runs").glob("*.json")
    opened = pico.build(inputs.settings(home, store=shared.address))[1]
    assert isinstance(opened, BucketStore)
    note = opened.bucket.notes()[record.stem]
    assert set(note["keys"]) == set(shared.walk.keys.values())
    secret = shared.server.environment["AWS_SECRET_ACCESS_KEY"].encode()
    files = [file for file in home.rglob("*") if file.is_file()]
    assert not [file for file in files if secret in file.read_bytes()]
    for name in shared.server.names(shared.address):
        path = f"{shared.address.removeprefix(f's3://{BUCKET}/')}/{name}"
        assert secret not in bytes(obstore.get(shared.server.raw(), path).bytes())


NOW = datetime.now(UTC)
OLD, NEW = (NOW - timedelta(days=90)).isoformat(), NOW.isoformat()
SERVER = "http://127.0.0.1:1"


@pytest.mark.parametrize(
    ("note", "registry", "kept"),
    [
        ({"created": NEW, "registry": ""}, "", True),
        ({"created": OLD, "registry": ""}, "", True),  # in a registry of its own machine
        ({"created": OLD, "registry": SERVER}, "", True),
        ({"created": OLD, "registry": SERVER}, SERVER, False),  # which is asked, then
        ({"created": NEW, "registry": SERVER}, SERVER, True),
        ({"created": OLD, "registry": "sqlite:////a/b.db"}, "sqlite:////a/b.db", True),
    ],
)
def test_what_runs_of_other_machines_used_stays(
    note: dict[str, Any], registry: str, kept: bool, tmp_path: Path
) -> None:
    since = NOW - timedelta(days=14)
    notes = {"20260101T000000-aa": {**note, "keys": ["k"]}}
    more = {"MLFLOW_TRACKING_URI": registry} if registry else {}
    with pico.environment(pico.clean_environment(**more)):
        assert keys_of_others(tmp_path, notes, since) == ({"k"} if kept else set())
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs/20260101T000000-aa.json").touch()  # its own record decides
        assert keys_of_others(tmp_path, notes, since) == set()
        with pytest.raises(StorageError, match="nothing was freed: the note of the run odd"):
            keys_of_others(tmp_path, {"odd": {"created": NEW}}, since)
