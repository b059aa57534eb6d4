"""The sequential mode, killed at any moment: the same command goes on at its block, same bytes."""

import shutil
from pathlib import Path

import pytest

from tests.pipeline import pico
from tests.pipeline.halting import halt

METHOD = "ada_svd:buckets=4"
LAST = pico.BLOCKS - 1
INSIDE = "model.layers.1.self_attn.o_proj"


@pytest.fixture(scope="module")
def whole(
    inputs: pico.Inputs, cold_walk: pico.Walk, tmp_path_factory: pytest.TempPathFactory
) -> pico.Walk:
    """A walk that nobody killed, in a home with the statistics of the dense model."""
    home = tmp_path_factory.mktemp("whole") / "home"
    shutil.copytree(cold_walk.session.store.root, home / "store")
    return pico.walk(inputs.settings(home, method=METHOD))


def weights_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def done_in(store: Path) -> set[str]:
    """Keys of what is there, but for the hidden states."""
    hidden = {folder.name for folder in pico.scratch_left(store)}
    return {file.parent.name for file in store.glob("*/*/*/manifest.json")} - hidden


def check_resumed(found: pico.Walk, whole: pico.Walk, done: set[str]) -> None:
    """Everything that was done is used, and what is made is what an uninterrupted run makes."""
    assert {o.key for o in found.outcomes if o.state == "cached"} == done & set(found.keys.values())
    assert (found.keys, found.digests, found.problems) == (whole.keys, whole.digests, [])
    assert weights_of(found.folder) == weights_of(whole.folder) != {}
    store = found.session.store.root
    assert pico.payload(store) == pico.payload(whole.session.store.root)
    assert pico.scratch_left(store) == []


def blocks_of(names: set[str]) -> set[int]:
    return {int(name.split(".")[2]) for name in names}


MOMENTS = [  # one of each kind, as a walk comes by; and the block in which the next goes on
    ("scratch", "hidden states behind block 0", "before", 1),
    ("measure", INSIDE, "before", 1),
    ("realise", INSIDE, "after", 1),
    ("advance", "model.layers.1", "before", 1),
    ("scratch", "hidden states behind block 1", "after", 2),
    ("advance", f"model.layers.{LAST}", "after", pico.BLOCKS),
]


def test_killed_at_one_moment_after_another_the_same_command_goes_on_at_its_block(
    whole: pico.Walk, inputs: pico.Inputs, warm_home: Path
) -> None:
    """Each walk but the last is killed; none makes again what one before it has made."""
    settings, went_on = inputs.settings(warm_home, method=METHOD), 0
    made: list[tuple[str, str]] = []
    for stage, unit, when, goes_on_in in MOMENTS:
        before = done_in(warm_home / "store")
        own = halt(settings, stage, unit, when)
        sequential = {unit for stage, unit in own if stage in ("measure", "realise", "advance")}
        assert blocks_of(sequential) <= set(range(went_on, pico.BLOCKS))
        assert len(done_in(warm_home / "store") - before) == len(own)
        made, went_on = made + own, goes_on_in
        advanced = [unit for stage, unit in made if stage == "advance"]
        assert advanced == [f"model.layers.{block}" for block in range(goes_on_in)]
    assert len(set(made)) == len(made)
    done = done_in(warm_home / "store")
    found = pico.walk(settings)
    check_resumed(found, whole, done)
    assert not {"measure", "realise", "advance"} & found.computed.keys()


@pytest.mark.parametrize("loss", ["gone", "damaged"])
def test_hidden_states_that_are_lost_are_made_again_to_the_bit(
    loss: str, whole: pico.Walk, inputs: pico.Inputs, warm_home: Path
) -> None:
    settings, store = inputs.settings(warm_home, method=METHOD), warm_home / "store"
    halt(settings, "realise", f"model.layers.{LAST}.self_attn.o_proj", "before")
    (scratch,) = pico.scratch_left(store)
    done = done_in(store)
    if loss == "gone":
        shutil.rmtree(scratch)
    else:
        chunk = next((scratch / "arrays/compressed").rglob("c*"))
        data = bytearray(chunk.read_bytes())
        data[len(data) // 2] ^= 1
        chunk.write_bytes(data)
    found = pico.walk(settings)
    assert [line for line in found.problems if "scratch" not in line] == []
    assert len(found.problems) == (1 if loss == "damaged" else 0)
    found.problems.clear()
    check_resumed(found, whole, done)
    assert blocks_of(found.computed["realise"] | found.computed["measure"]) == {LAST}


@pytest.mark.parametrize("stage", ["measure", "realise", "advance"])
def test_a_lost_artifact_alone_is_made_again(
    stage: str, whole: pico.Walk, inputs: pico.Inputs, home: Path
) -> None:
    shutil.copytree(whole.session.store.root, home / "store")
    unit = "model.layers.1" if stage == "advance" else INSIDE
    key = whole.keys[(stage, unit)]
    shutil.rmtree(home / "store" / stage / key[:2] / key)
    found = pico.walk(inputs.settings(home, method=METHOD))
    assert found.computed == {stage: {unit}}
    assert found.digests == whole.digests
    assert pico.scratch_left(home / "store") == []


def test_another_budget_after_a_kill_leaves_the_first_one_to_go_on(
    whole: pico.Walk, inputs: pico.Inputs, warm_home: Path
) -> None:
    settings = inputs.settings(warm_home, method=METHOD)
    halt(settings, "measure", INSIDE, "after")
    done = done_in(warm_home / "store") & set(whole.keys.values())
    pico.walk({**settings, "kept": 0.5})
    found = pico.walk(settings)
    assert {o.key for o in found.outcomes if o.state == "cached"} >= done
    assert weights_of(found.folder) == weights_of(whole.folder)
    assert pico.scratch_left(warm_home / "store") == []
