"""What machines that share a bucket can rely on."""

import shutil
from datetime import timedelta
from pathlib import Path

import pytest

from flows.runs.stores import open_store
from storage.artifact import Artifact
from storage.bucket import Bucket
from storage.bucket_gc import collect_shared_garbage
from storage.errors import (
    ArtifactMissingError,
    ObjectsError,
    StorageError,
    StoreVersionError,
)
from storage.keys import recipe_key
from storage.lookup import MissingArtifact
from storage.records import seal
from storage.store import Store
from tests.contracts.buckets import Faulty, Lost, machine, make, recipe, value_of

NOW = timedelta(0)


@pytest.fixture
def objects() -> Faulty:
    return Faulty()


def test_what_one_machine_makes_another_finds(tmp_path: Path, objects: Faulty) -> None:
    made = make(machine(tmp_path / "a", objects), "x", 7)
    problems: list[str] = []
    other = machine(tmp_path / "b", objects, problems)
    assert value_of(other, "x") == 7
    assert other.find(made.key, "weigh") == made
    here = Store(tmp_path / "b", pytest.fail)  # a plain store sees it, too
    assert here.find(made.key) == made
    assert problems == []


def test_a_machine_reads_from_its_own_disk_what_it_has(tmp_path: Path, objects: Faulty) -> None:
    make(machine(tmp_path / "a", objects), "x", 7)
    again = machine(tmp_path / "a", objects)
    objects.asked.clear()
    assert value_of(again, "x") == 7
    assert objects.asked == []


def test_the_manifest_comes_last_and_once(tmp_path: Path, objects: Faulty) -> None:
    make(machine(tmp_path / "a", objects), "x")
    puts = [line.split("/")[0] for line in objects.asked if line.startswith("put")]
    assert puts == ["put payload", "put index", "put manifests"]


@pytest.mark.parametrize("place", ["payload", "index", "manifests"])
def test_a_crash_on_the_way_leaves_nothing_that_others_see(
    tmp_path: Path, objects: Faulty, place: str
) -> None:
    objects.dies_at = place
    with pytest.raises(Lost):
        make(machine(tmp_path / "a", objects), "x", 7)
    objects.dies_at = ""
    assert value_of(machine(tmp_path / "b", objects), "x") is None
    mended = machine(tmp_path / "a", objects)
    assert value_of(mended, "x") == 7  # committed here before, and put there now
    assert value_of(machine(tmp_path / "b", objects), "x") == 7


def test_a_bucket_that_fails_is_one_sentence_and_loses_nothing(
    tmp_path: Path, objects: Faulty
) -> None:
    objects.fails_at = "payload"
    store = machine(tmp_path / "a", objects)
    with pytest.raises(ObjectsError, match=r"cannot be reached\. What was computed is kept in"):
        make(store, "x", 7)
    with pytest.raises(ObjectsError, match="the same command again puts it there"):
        store.find(recipe_key(recipe("x")), "weigh")
    objects.fails_at = ""
    value_of(store, "x")
    assert value_of(machine(tmp_path / "b", objects), "x") == 7


def test_what_a_plain_store_made_is_shared_once_it_is_used(tmp_path: Path, objects: Faulty) -> None:
    key = recipe_key(recipe("x"))
    plain = Store(tmp_path / "a", pytest.fail)
    with plain.draft(key=key, stage="weigh", unit="u", recipe=recipe("x"), inputs={}) as draft:
        draft.attrs["one"] = 1
    machine(tmp_path / "a", objects).find(key, "weigh")
    found = machine(tmp_path / "b", objects).find(key, "weigh")
    assert found == draft.manifest


def test_the_first_of_two_wins_and_both_have_its_bytes(tmp_path: Path, objects: Faulty) -> None:
    first, second = machine(tmp_path / "a", objects), machine(tmp_path / "b", objects)
    won = make(first, "x", 1)
    got = make(second, "x", 2)
    assert got == won
    assert value_of(second, "x") == value_of(first, "x") == 1
    assert len(objects.names("payload")) == 1


def test_two_who_make_the_same_keep_what_they_have(tmp_path: Path, objects: Faulty) -> None:
    make(machine(tmp_path / "a", objects), "x", 1)
    second = machine(tmp_path / "b", objects)
    before = make(second, "x", 1)
    assert second.find(before.key, "weigh") == before
    assert len(objects.names("payload")) == 1


def test_an_answer_that_got_lost_is_no_defeat(
    tmp_path: Path, objects: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library asks again after a put whose answer did not come: then there is one."""
    create = objects.create

    def twice(name: str, data: bytes) -> bool:
        create(name, data)
        return create(name, data)

    monkeypatch.setattr(objects, "create", twice)
    make(machine(tmp_path / "a", objects), "x", 7)
    assert value_of(machine(tmp_path / "b", objects), "x") == 7


@pytest.mark.parametrize("place", ["payload", "manifests"])
@pytest.mark.parametrize("byte", [0, 40, -1])
def test_damage_in_the_bucket_is_told_and_replaced(
    tmp_path: Path, objects: Faulty, place: str, byte: int
) -> None:
    make(machine(tmp_path / "a", objects), "x", 7)
    (name,) = objects.names(place)
    objects.flip(name, byte)
    problems: list[str] = []
    other = machine(tmp_path / "b", objects, problems)
    assert value_of(other, "x") is None
    assert len(problems) == 1 and problems[0].endswith("; will be computed again")
    assert value_of(other, "x") is None and len(problems) == 1
    make(other, "x", 8)
    assert value_of(machine(tmp_path / "c", objects), "x") == 8


@pytest.mark.parametrize("harm", ["cut", "gone"])
def test_bytes_that_are_missing_are_damage(tmp_path: Path, objects: Faulty, harm: str) -> None:
    store = machine(tmp_path / "a", objects)
    made = make(store, "x", 7)
    (name,) = objects.names("payload")
    if harm == "cut":
        objects.send(name, iter([objects.read(name)[:-9]]), 0)
    else:
        objects.delete([name])
    assert len(store.check(made)) == 1
    problems: list[str] = []
    assert value_of(machine(tmp_path / "b", objects, problems), "x") is None
    assert len(problems) == 1


def test_damage_here_is_mended_from_the_bucket(tmp_path: Path, objects: Faulty) -> None:
    problems: list[str] = []
    store = machine(tmp_path / "a", objects, problems)
    made = make(store, "x", 7)
    file = store.layout.artifact("weigh", made.key) / "files/model/note.txt"
    file.write_text("x 8")
    assert value_of(store, "x") == 7
    assert len(problems) == 1 and problems[0].endswith("will be fetched or computed again")


def test_a_disk_that_garbles_does_not_cost_the_bucket_anything(
    tmp_path: Path, objects: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(machine(tmp_path / "a", objects), "x", 7)
    monkeypatch.setattr("storage.verify.deep_problems", lambda folder, manifest: ["garbled"])
    with pytest.raises(StorageError, match=r"damaged once it is written below .*check that disk"):
        value_of(machine(tmp_path / "b", objects), "x")
    monkeypatch.undo()
    assert value_of(machine(tmp_path / "c", objects), "x") == 7


def test_scratch_stays_on_its_disk(tmp_path: Path, objects: Faulty) -> None:
    store = machine(tmp_path / "a", objects)
    objects.asked.clear()
    make(store, "x", 7, stage="scratch")
    assert value_of(store, "x", "scratch") == 7
    store.remove(recipe_key(recipe("x")))
    assert store.find(recipe_key(recipe("x")), "scratch") is None
    assert objects.asked == []


def test_what_is_removed_is_gone_on_both_sides(tmp_path: Path, objects: Faulty) -> None:
    store = machine(tmp_path / "a", objects)
    made = make(store, "x", 7)
    store.remove(made.key)
    assert objects.names() == []
    assert value_of(store, "x") is None
    with pytest.raises(ArtifactMissingError):
        store.remove(made.key)


def test_a_look_fetches_nothing(tmp_path: Path, objects: Faulty) -> None:
    store = machine(tmp_path / "a", objects)
    one = make(store, "x", 1)
    two = make(store, "y", 2, of=[one])
    other = machine(tmp_path / "b", objects)
    assert other.peek(one.key, "weigh") == other.peek(one.key) == one
    assert other.peek(recipe_key({})) is None
    assert other.candidates("weigh", "layer x") == [one]
    assert other.candidates("weigh", "layer z") == other.candidates("scratch", "layer x") == []
    assert other.resolve(two.key[:12]) == two
    assert other.lineage(two.key) == [two, one]
    assert sorted(m.key for m in other.manifests()) == sorted([one.key, two.key])
    assert list(other.manifests("collect")) == []
    assert other.stages() == ["weigh"]
    assert not any(line.startswith("read payload") for line in objects.asked)
    assert not other.layout.artifact("weigh", one.key).exists()
    assert isinstance(other.open(one.key, "weigh"), Artifact)  # until it is opened


def test_looking_at_many_units_asks_for_two_listings(tmp_path: Path, objects: Faulty) -> None:
    """What is on this disk costs no request of its own, and what is in neither none at all."""
    store = machine(tmp_path / "a", objects)
    made = [make(store, str(n)) for n in range(5)]
    objects.asked.clear()
    again = machine(tmp_path / "a", objects)
    for n in range(9):
        again.candidates("weigh", f"layer {n}")
        again.peek(recipe_key(recipe(str(n))), "weigh")
    assert objects.asked == ["list manifests", "list index"]
    fresh = machine(tmp_path / "b", objects)
    objects.asked.clear()
    for one in made * 3:
        fresh.candidates("weigh", one.unit)
        fresh.peek(one.key, "weigh")
    assert len([line for line in objects.asked if line.startswith("read")]) == len(made)


def test_lineage_names_what_is_in_neither(tmp_path: Path, objects: Faulty) -> None:
    store = machine(tmp_path / "a", objects)
    one = make(store, "x", 1)
    two = make(store, "y", 2, of=[one])
    store.remove(one.key)
    assert store.lineage(two.key) == [two, MissingArtifact(one.key, one.digest, "input 0")]


def test_check_reads_the_bucket_beside_the_disk(tmp_path: Path, objects: Faulty) -> None:
    store = machine(tmp_path / "a", objects)
    made = make(store, "x", 7)
    assert store.check(made) == []
    (name,) = objects.names("payload")
    objects.flip(name)
    for one in (store, machine(tmp_path / "b", objects)):
        (problem,) = one.check(made)
        assert problem.startswith("memory://shared: ") and "checksum is wrong" in problem


def test_what_does_not_belong_into_the_bucket_is_named(tmp_path: Path, objects: Faulty) -> None:
    store = machine(tmp_path / "a", objects)
    store.begin()
    make(store, "x", 7)
    assert list(store.strays()) == []
    for name in ("notes.txt", "manifests/weigh/short", "payload/x", "models/a/b/c"):
        objects.create(name, b"")
        assert [str(path) for path in store.strays()] == [f"memory://shared/{name}"]
        objects.delete([name])


def test_a_newer_format_is_refused(objects: Faulty) -> None:
    Bucket(objects).check()
    objects.create("FORMAT.json", seal({"format": 99}))
    with pytest.raises(StoreVersionError, match="has store format 99"):
        Bucket(objects).check()
    objects.flip("FORMAT.json")
    with pytest.raises(ObjectsError, match=r"FORMAT\.json is damaged"):
        Bucket(objects).check()


def test_a_bucket_that_replaces_is_refused(
    objects: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    Bucket(objects).begin()
    Bucket(objects).begin()
    objects.delete(["FORMAT.json"])
    monkeypatch.setattr(objects, "create", lambda name, data: True)
    with pytest.raises(ObjectsError, match="If-None-Match"):
        Bucket(objects).begin()


def test_gc_frees_here_and_there_what_no_root_reaches(tmp_path: Path, objects: Faulty) -> None:
    store = machine(tmp_path / "a", objects)
    above = make(store, "above", 1)
    root = make(store, "root", 2, of=[above])
    other = make(machine(tmp_path / "b", objects), "other", 3)
    here_only = make(store, "dead", 4)
    before = objects.names()
    dry = collect_shared_garbage(store, [root.key], True, NOW)
    assert objects.names() == before
    wet = collect_shared_garbage(store, [root.key], False, NOW)
    assert dry == wet and wet.there is not None
    assert {m.key for m in wet.removed} == {here_only.key}
    assert {m.key for m in wet.there.removed} == {here_only.key, other.key}
    assert wet.there.freed_bytes == other.nbytes + here_only.nbytes
    assert wet.kept == wet.there.kept == 2
    left = {name.split("/")[-1] for name in objects.names("manifests")}
    assert left == {above.key, root.key}
    assert len(objects.names("payload")) == len(objects.names("index")) == 2
    assert value_of(machine(tmp_path / "c", objects), "root") == 2


def test_gc_follows_what_is_only_in_the_bucket(tmp_path: Path, objects: Faulty) -> None:
    store = machine(tmp_path / "a", objects)
    above = make(store, "above", 1)
    make(store, "root", 2, of=[above])
    store.evict(recipe_key(recipe("root")))
    report = collect_shared_garbage(store, [recipe_key(recipe("root"))], False, NOW)
    assert report.removed == [] and report.there is not None and report.there.removed == []


def test_gc_leaves_in_the_bucket_what_is_young(tmp_path: Path, objects: Faulty) -> None:
    store = machine(tmp_path / "a", objects)
    make(store, "x", 1)
    objects.dies_at = "manifests"
    with pytest.raises(Lost):
        make(store, "y", 2)
    before = objects.names()
    report = collect_shared_garbage(store, [], False)
    assert objects.names() == before
    assert len(report.removed) == 2  # here nobody else is at work
    assert report.there is not None and report.there.removed == []


def test_gc_takes_up_what_a_crash_left(tmp_path: Path, objects: Faulty) -> None:
    store = machine(tmp_path / "a", objects)
    objects.dies_at = "manifests"
    with pytest.raises(Lost):
        make(store, "x", 1)
    objects.dies_at = ""
    make(store, "y", 2)
    (damaged,) = objects.names("manifests")
    objects.flip(damaged)
    report = collect_shared_garbage(store, [], False, NOW)
    assert report.there is not None and len(report.there.orphans) == 3
    assert objects.names("payload") == objects.names("manifests") == []


def test_a_folder_that_was_deleted_is_filled_again(tmp_path: Path, objects: Faulty) -> None:
    store = machine(tmp_path / "a", objects)
    for n in range(3):
        make(store, str(n), n)
    shutil.rmtree(tmp_path / "a")
    again = machine(tmp_path / "a", objects)
    assert [value_of(again, str(n)) for n in range(3)] == [0, 1, 2]


def test_notes_of_runs_come_back(tmp_path: Path, objects: Faulty) -> None:
    store = machine(tmp_path / "a", objects)
    store.note_run("run-1", "2026-01-01T00:00:00+00:00", ["b", "a"], "")
    (note,) = store.bucket.notes().values()
    assert (note["keys"], note["registry"]) == (["a", "b"], "")
    objects.flip("runs/run-1")
    with pytest.raises(ObjectsError, match="run-1 is damaged"):
        store.bucket.notes()


def test_files_are_cut_at_pieces_and_put_together_again(
    tmp_path: Path, objects: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.pack.PIECE", 700)  # of about 5,000 bytes in several files
    store = machine(tmp_path / "a", objects)
    made = make(store, "x", 7)
    assert value_of(machine(tmp_path / "b", objects), "x") == 7
    assert store.check(made) == []
    objects.flip(objects.names("payload")[0], 2000)
    assert len(store.check(made)) == 1


def test_a_shared_folder_is_a_bucket_too(tmp_path: Path) -> None:
    address = (tmp_path / "shared").as_uri()
    key = recipe_key({})
    one = open_store(tmp_path / "a", address, pytest.fail)
    one.begin()
    with one.draft(key=key, stage="weigh", unit="u", recipe={}, inputs={}) as draft:
        draft.attrs["one"] = 1
    assert open_store(tmp_path / "b", address, pytest.fail).find(key, "weigh") == draft.manifest
