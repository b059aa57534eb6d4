"""What is cached is reused, exactly what changed is computed, and a run that was killed goes on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.runs.workspace import open_workspace
from flows.settings.config import RunConfig
from storage.errors import StorageError
from tasks.engine.session import Session
from tests.pipeline import pico
from tests.pipeline.forking import run_script

LAST = pico.BLOCKS - 1


def layer_names(block: int) -> set[str]:
    inside = [f"self_attn.{name}_proj" for name in "qkvo"]
    inside += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    return {f"model.layers.{block}.{name}" for name in inside}


def test_a_cold_run_computes_everything_and_a_warm_one_nothing(
    cold_walk: pico.Walk, inputs: pico.Inputs, warm_home: Path
) -> None:
    assert {stage: len(units) for stage, units in cold_walk.computed.items()} == pico.UNITS
    before = pico.tree(warm_home / "store")
    warm = pico.walk(inputs.settings(warm_home))
    assert warm.computed == {}
    assert warm.digests == cold_walk.digests
    assert pico.tree(warm_home / "store") == before
    assert pico.scratch_left(warm_home / "store") == []


def test_two_homes_hold_the_same_bytes(
    cold_walk: pico.Walk, inputs: pico.Inputs, home: Path
) -> None:
    again = pico.walk(inputs.settings(home))
    assert again.digests == cold_walk.digests
    assert pico.payload(home / "store") == pico.payload(cold_walk.session.store.root)


@pytest.mark.parametrize(
    ("changes", "computed"),
    [
        ({"kept": 0.4}, {"allocate", "realise", "materialise", "evaluate"}),
        ({"method": "asvd"}, {"weigh", "decompose", "realise", "materialise", "evaluate"}),
        ({"method": "svd"}, {"decompose", "realise", "materialise", "evaluate"}),
        ({"batch_size": 1}, set()),
        ({"seed": 4}, set(pico.UNITS) - {"allocate"}),
        ({"products": "float32"}, set(pico.UNITS) - {"allocate", "tokenise"}),
        ({"eval_windows": 4}, {"tokenise", "evaluate"}),
        ({"refresh": ["weigh", "materialise"]}, {"weigh", "materialise"}),
    ],
)
def test_a_change_computes_what_depends_on_it(
    changes: dict[str, Any],
    computed: set[str],
    cold_walk: pico.Walk,
    inputs: pico.Inputs,
    warm_home: Path,
) -> None:
    changed = pico.walk(inputs.settings(warm_home, **changes))
    assert set(changed.computed) == computed
    if changes.get("method") == "asvd":
        assert (
            changed.digests[("collect", "model.layers.0.self_attn.q_proj")]
            == (cold_walk.digests[("collect", "model.layers.0.self_attn.q_proj")])
        )
    if "seed" in changes:
        assert changed.computed["tokenise"] == {"calibration"}
        assert changed.computed["evaluate"] == {"compressed on evaluation.txt"}
    assert pico.scratch_left(warm_home / "store") == []


def test_refreshing_what_is_not_there_computes_it(inputs: pico.Inputs, home: Path) -> None:
    found = pico.walk(inputs.settings(home, method="svd", refresh=["decompose"]))
    assert len(found.computed["decompose"]) == pico.UNITS["decompose"]


def test_moved_and_saved_again_is_the_same_model(
    cold_walk: pico.Walk, inputs: pico.Inputs, warm_home: Path, tmp_path: Path
) -> None:
    moved = pico.copy_inputs(inputs, tmp_path / "elsewhere")
    pico.change_weight(moved.model, "model.norm.weight", lambda weight: weight)
    config = json.loads((moved.model / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")  # as older versions of transformers wrote it
    config["transformers_version"] = "5.0.0"
    (moved.model / "config.json").write_text(json.dumps(config))
    assert pico.walk(moved.settings(warm_home)).computed == {}


@pytest.mark.parametrize("block", range(pico.BLOCKS))
def test_a_changed_weight_computes_its_block_and_what_comes_after(
    block: int, cold_walk: pico.Walk, inputs: pico.Inputs, warm_home: Path, tmp_path: Path
) -> None:
    changed = pico.copy_inputs(inputs, tmp_path / "changed")
    layer = f"model.layers.{block}.mlp.up_proj"
    pico.change_weight(changed.model, f"{layer}.weight", lambda weight: weight * 1.5)
    found = pico.walk(changed.settings(warm_home))
    later = {n for b in range(block + 1, pico.BLOCKS) for n in layer_names(b)}
    # in its own block only the input of down_proj is another one: early cut-off for all others
    touched = later | {layer, f"model.layers.{block}.mlp.down_proj"}
    assert "tokenise" not in found.computed
    assert {int(tap.split(".")[2]) for tap in found.computed["collect"]} == set(
        range(block, pico.BLOCKS)
    )
    assert found.computed["weigh"] == touched & found.names("weigh")
    assert found.computed["decompose"] == touched
    assert found.computed["realise"] == touched
    assert pico.scratch_left(warm_home / "store") == []
    if block == 1:  # before, inside and behind what changed: the same as from nothing
        fresh = pico.walk(changed.settings(tmp_path / "fresh"))
        assert fresh.digests == found.digests


def flip(folder: Path) -> None:
    chunk = folder / "arrays/v/c.0.0"
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)


def remove_chunk(folder: Path) -> None:
    (folder / "arrays/v/c.0.0").unlink()


def cut_manifest(folder: Path) -> None:
    file = folder / "manifest.json"
    file.write_bytes(file.read_bytes()[:-40])


@pytest.mark.parametrize(
    ("damage", "lines"), [(flip, 1), (remove_chunk, 1), (cut_manifest, 1), (shutil.rmtree, 0)]
)
def test_a_damaged_artifact_alone_is_computed_again(
    damage: Callable[[Path], None],
    lines: int,
    cold_walk: pico.Walk,
    inputs: pico.Inputs,
    warm_home: Path,
) -> None:
    layer = "model.layers.1.mlp.up_proj"
    damage(pico.artifact_folder(warm_home / "store", "decompose", layer))
    found = pico.walk(inputs.settings(warm_home))
    assert len(found.problems) == lines
    assert all("decompose" in line and "\n" not in line for line in found.problems)
    assert found.computed == {"decompose": {layer}}
    assert found.digests == cold_walk.digests


@pytest.mark.parametrize("block", range(pico.BLOCKS))
def test_lost_statistics_alone_are_measured_again(
    block: int, cold_walk: pico.Walk, inputs: pico.Inputs, warm_home: Path
) -> None:
    tap = f"model.layers.{block}.self_attn.o_proj"
    shutil.rmtree(pico.artifact_folder(warm_home / "store", "collect", tap))
    found = pico.walk(inputs.settings(warm_home))
    assert found.computed == {"collect": {tap}}
    assert found.digests == cold_walk.digests
    assert pico.scratch_left(warm_home / "store") == []


@pytest.mark.parametrize("batch_size", [1, 5])
def test_batch_size_changes_rounding_only(
    batch_size: int, cold_walk: pico.Walk, inputs: pico.Inputs, home: Path
) -> None:
    found = pico.walk(inputs.settings(home, batch_size=batch_size))
    expected = cold_walk.metrics()
    assert found.metrics()["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-6)
    assert found.metrics()["kl"] == pytest.approx(expected["kl"], rel=1e-5)


def copy_packages(folder: Path) -> Path:
    """Ours and the tests' whole: whatever of them a script imports is the copy's."""
    for package in ("compress_core", "storage", "tasks", "flows", "tests"):
        shutil.copytree(
            pico.ROOT / package,
            folder / package,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    return folder


WALK = """
import json, sys
from pathlib import Path
from tests.pipeline import pico
import compress_core
assert compress_core.__file__.startswith(sys.argv[1]), compress_core.__file__
from flows.settings.config import RunConfig, SweepConfig
from flows.runs.forecast import Planner
from flows.runs.pipeline import build_pipeline
from flows.runs.workspace import open_workspace
settings = json.loads(sys.argv[2])
workspace = open_workspace(RunConfig(**settings))
planned = Planner(workspace.store).plan(build_pipeline(workspace, RunConfig(**settings)))
why = sorted({f"{unit.stage}: {unit.why}" for unit in planned if unit.state == "run"})
computed = pico.walk(settings).computed
print(json.dumps({"why": why, "computed": sorted(computed)}))
"""


def walk_with(code: Path, settings: dict[str, Any]) -> dict[str, list[str]]:
    """Plans and walks in a process that runs the packages in ``code``."""
    given = json.dumps(settings, default=str)
    return dict(json.loads(run_script(WALK, code, given, folder=code, path=[code])))


def test_words_about_code_change_no_key_and_numbers_in_it_do(
    cold_walk: pico.Walk, inputs: pico.Inputs, warm_home: Path, tmp_path: Path
) -> None:
    code = copy_packages(tmp_path / "code")
    for package in ("compress_core", "tasks"):
        for file in (code / package).rglob("*.py"):
            text = file.read_text()
            if text.startswith('"""') and file.name != "factored.py":
                text = '"""Other words: ' + text[3:]
            file.write_text(text.replace("\ndef ", "\n# a remark\ndef "))
    assert walk_with(code, inputs.settings(warm_home)) == {"why": [], "computed": []}
    change(
        code / "compress_core" / "metric.py",
        "return SecondMoment(stats.moment)",
        "return SecondMoment(stats.moment * (1 + 1e-12))",
    )
    found = walk_with(code, inputs.settings(warm_home))
    changed = "code of compress_core.metric"  # the metric that both stages compute
    assert sorted(found["why"]) == [f"decompose: {changed}", f"weigh: {changed}"]
    assert "weigh" in found["computed"]
    assert "collect" not in found["computed"] and "tokenise" not in found["computed"]


def test_a_number_where_factors_are_cut_or_put_realises_again(
    inputs: pico.Inputs, warm_home: Path, tmp_path: Path
) -> None:
    """The core's half and the task's, each by its name: once the second was not in the key."""
    code = copy_packages(tmp_path / "code")
    change(
        code / "compress_core/layer/make.py",
        "return LowRank(whole.u[",
        "return LowRank(0.5 * whole.u[",
    )
    change(
        code / "tasks/stages/realise.py",
        "put(draft, packed)",
        "put(draft, packed if 0.5 else packed)",
    )
    found = walk_with(code, inputs.settings(warm_home))
    (why,) = (why for why in found["why"] if why.startswith("realise: "))
    assert "code of compress_core.layer.make" in why and "code of tasks.stages.realise" in why
    assert "realise" in found["computed"] and "decompose" not in found["computed"]


def change(file: Path, old: str, new: str) -> None:
    """Other words in a file, which has the old ones once."""
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))


@pytest.mark.parametrize("which", ["model", "text"])
def test_nothing_is_kept_of_files_that_change_while_they_are_in_use(
    inputs: pico.Inputs, tmp_path: Path, which: str
) -> None:
    mine = pico.copy_inputs(inputs, tmp_path / "mine")
    settings = mine.settings(tmp_path / "home")
    workspace = open_workspace(RunConfig(**settings))
    calibration, _ = workspace.texts
    assert calibration is not None
    _ = workspace.model.stored, workspace.model.tokenizer_digest
    if which == "model":
        pico.change_weight(mine.model, "model.norm.weight", lambda weight: weight + 1)
    else:
        mine.calibration.write_text(pico.made_text(7, 4000))
    session = Session(workspace.store, confirm=workspace.confirm)
    with pytest.raises(StorageError, match="was changed while it was in use"):
        session.run(calibration)
    assert list(workspace.store.manifests()) == []
    assert list(workspace.store.layout.tmp.iterdir()) == []
    if which == "text":  # only tokenising reads it
        workspace.confirm("collect")
