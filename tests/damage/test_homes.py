"""Two hundred damages to a data directory: the same numbers again, or a line that says why not."""

import json
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compress_core.errors import CompressError
from flows.commands.store import store_app
from storage.errors import StorageError
from tests.damage import nonsense
from tests.pipeline import pico

TRIES, SEED = 200, 12


@pytest.fixture(scope="module")
def inputs_of(tmp_path_factory: pytest.TempPathFactory) -> pico.Inputs:
    """One block, so that a whole run takes a moment."""
    folder = tmp_path_factory.mktemp("inputs")
    return pico.make_inputs(folder, config=partial(pico.llama, blocks=1))


def settings_in(inputs: pico.Inputs, home: Path) -> dict[str, object]:
    return inputs.settings(home, samples=2, length=32, eval_windows=2)


@pytest.fixture(scope="module")
def sound(inputs_of: pico.Inputs, tmp_path_factory: pytest.TempPathFactory) -> pico.Walk:
    """A run in a home that nothing was done to, with a record of it."""
    home = tmp_path_factory.mktemp("sound") / "home"
    walk = pico.walk(settings_in(inputs_of, home))
    (home / "runs").mkdir()
    stages = [
        {"name": outcome.stage, "unit": outcome.unit, "key": outcome.key, "state": outcome.state}
        for outcome in walk.outcomes
    ]
    record = {"created": "2100-01-01T00:00:00+00:00", "result": {"stages": stages}}
    (home / "runs" / "one.json").write_text(json.dumps(record))
    return walk


def harm_json(home: Path, chance: random.Random) -> str:
    """A value nobody means in one of our own records."""
    files = sorted(path for path in home.rglob("*.json") if path.is_file())
    return nonsense.mutate_json(chance.choice(files), chance)


def add_stray(home: Path, chance: random.Random) -> str:
    """Something that should not be there."""
    folder = chance.choice(sorted(path for path in home.rglob("*") if path.is_dir()))
    name = chance.choice(["stray.safetensors", "zarr.json", "manifest.json", "x", ".hidden"])
    if (folder / name).exists():
        return "nothing"
    (folder / name).write_text(chance.choice(["", "{}", "x" * 100]))
    return f"added {name} to {folder.name}"


def lose_folder(home: Path, chance: random.Random) -> str:
    """A folder that is gone."""
    folder = chance.choice(sorted(path for path in home.rglob("*") if path.is_dir()))
    shutil.rmtree(folder)
    return f"lost {folder.name}"


def file_for_folder(home: Path, chance: random.Random) -> str:
    """A file where a folder is expected."""
    folder = chance.choice(sorted(path for path in home.rglob("*") if path.is_dir()))
    shutil.rmtree(folder)
    folder.write_text("x")
    return f"{folder.name} is a file"


def swap_artifacts(home: Path, chance: random.Random) -> str:
    """Two artifacts in each other's place."""
    found = sorted(file.parent for file in (home / "store").glob("*/*/*/manifest.json"))
    one, other = chance.sample(found, 2)
    one.rename(home / "aside")
    other.rename(one)
    (home / "aside").rename(other)
    return f"{one.name[:8]} and {other.name[:8]} exchanged"


KINDS: tuple[Callable[[Path, random.Random], str], ...] = (
    *(nonsense.harm, nonsense.harm, harm_json, add_stray, lose_folder, file_for_folder),
    swap_artifacts,
)


@pytest.mark.parametrize("number", range(TRIES))
def test_a_damaged_home(
    number: int, inputs_of: pico.Inputs, sound: pico.Walk, tmp_path: Path
) -> None:
    chance = random.Random(SEED * 1000 + number)
    home = tmp_path / "home"
    shutil.copytree(sound.session.store.root.parent, home)
    done = chance.choice(KINDS)(home, chance)
    look(home, chance, done)
    try:
        walk = pico.walk(settings_in(inputs_of, home))
    except (CompressError, StorageError) as refusal:
        assert str(refusal).strip() and str(home) in str(refusal), done
        return
    assert walk.metrics() == sound.metrics(), done
    assert pico.tree(walk.folder) == pico.tree(sound.folder), done


def look(home: Path, chance: random.Random, done: str) -> None:
    """Looks at the store with one of its commands: an answer, or one line."""
    # gc asks the registry, whose tables take a second to make: it has its turn now and then.
    words = ["gc", "--dry-run"] if chance.random() < 0.05 else chance.choice([["ls"], ["verify"]])
    with pico.environment(pico.clean_environment()):
        result = CliRunner().invoke(store_app, [*words, "--home", str(home)])
    fine = result.exception is None or isinstance(
        result.exception, SystemExit | CompressError | StorageError
    )
    assert fine, (words, done, result.exc_info)
