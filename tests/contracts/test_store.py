"""What the store promises while all is well: bits come back and content has one digest."""

import time
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp

from storage.errors import ArtifactMissingError, StorageError
from storage.gc import collect_garbage
from storage.keys import recipe_key
from storage.lookup import MissingArtifact
from storage.manifest import Manifest
from storage.records import read_record
from storage.store import Store

DTYPES = ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
DTYPES += ["float16", "float32", "float64", "complex64", "complex128"]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", on_problem=pytest.fail)


def make(
    store: Store, seed: int = 0, *, stage: str = "decompose", unit: str = "layer 0", **options
) -> Manifest:
    """Commit one artifact that holds an array "u", made from the artifacts `of`."""
    recipe = {"stage": stage, "seed": seed, **options.get("recipe", {})}
    inputs = {
        f"input {n}": {"key": m.key, "digest": m.digest}
        for n, m in enumerate(options.get("of", []))
    }
    key = recipe_key(recipe)
    with store.draft(key=key, stage=stage, unit=unit, recipe=recipe, inputs=inputs) as draft:
        draft.put("u", np.full((300, 4), options.get("value", seed), np.float32))
        draft.attrs["rank"] = 4
        draft.info["seconds"] = time.perf_counter()
    return draft.manifest


def put_and_get(folder: Path, array: np.ndarray, logical: str | None = None) -> np.ndarray:
    store = Store(folder, on_problem=pytest.fail)
    key = recipe_key({"n": len(list(folder.rglob("manifest.json")))})
    with store.draft(key=key, stage="collect", unit="x", recipe={}, inputs={}) as draft:
        draft.put("x", array, logical)
    assert store.find(key) == draft.manifest
    artifact = store.open(key, "collect")
    assert artifact.logical_dtype("x") == (logical or array.dtype.name)
    return artifact.array("x")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    array = np.random.default_rng(0).integers(0, 2, (300, 3)).astype(dtype)
    back = put_and_get(tmp_path, array)
    assert back.dtype == array.dtype
    assert back.tobytes() == array.tobytes()


def test_bfloat16_bits_come_back_exactly_even_nans(tmp_path: Path) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(512, 128)
    np.testing.assert_array_equal(put_and_get(tmp_path, bits, "bfloat16"), bits)


@settings(max_examples=25, deadline=None)
@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)))
def test_every_shape_comes_back(
    tmp_path_factory: pytest.TempPathFactory, array: np.ndarray
) -> None:
    back = put_and_get(tmp_path_factory.getbasetemp() / "shapes", array)
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()


@pytest.mark.parametrize("shape", [(), (0,), (1 << 18,), ((1 << 18) + 1,), (256, 2), (257, 2)])
def test_shapes_at_chunk_borders_come_back(tmp_path: Path, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    np.testing.assert_array_equal(put_and_get(tmp_path, np.asarray(array)), array)


def test_foreign_byte_order_and_strides_are_stored_by_value(tmp_path: Path) -> None:
    array = np.arange(24, dtype=">i4").reshape(4, 6)[::2, ::-1]
    np.testing.assert_array_equal(put_and_get(tmp_path, array), array)


def test_the_first_rows_are_read_without_the_later_chunks(store: Store) -> None:
    key = recipe_key({})
    array = np.arange(3000, dtype=np.float64).reshape(1000, 3)
    with store.draft(key=key, stage="decompose", unit="x", recipe={}, inputs={}) as draft:
        draft.put("u", array)
    chunks = sorted((store.root / "decompose" / key[:2] / key / "arrays" / "u").glob("c.*"))
    assert len(chunks) == 4
    for chunk in chunks[1:]:
        chunk.unlink()
    artifact = store.open(key)
    for rows in (0, 1, 255, 256):
        np.testing.assert_array_equal(artifact.array("u", rows), array[:rows])
    with pytest.raises(StorageError, match="lacks its chunk"):
        artifact.array("u", 257)
    with pytest.raises(ValueError, match="no first 1001 rows"):
        artifact.array("u", 1001)


def test_the_arrays_are_a_plain_zarr_v3_group(store: Store) -> None:
    made = make(store, 7)
    group = zarr.open_group(store.layout.artifact(made.stage, made.key) / "arrays", mode="r")
    assert group.metadata.zarr_format == 3
    assert dict(group.arrays())["u"].shape == (300, 4)


def test_payload_files_keep_their_folders(store: Store) -> None:
    key = recipe_key({})
    with store.draft(key=key, stage="materialise", unit="model", recipe={}, inputs={}) as draft:
        draft.add_file("model/config.json").write_text("{}")
        draft.add_file("notes.txt").write_text("hello")
    artifact = store.open(key)
    assert artifact.file("notes.txt").read_text() == "hello"
    assert (artifact.file("model") / "config.json").read_text() == "{}"
    assert {"files/model/config.json", "files/notes.txt"} <= artifact.manifest.files.keys()
    with pytest.raises(ArtifactMissingError, match=r"no file 'other\.txt'"):
        artifact.file("other.txt")


def test_the_digest_names_the_content_and_nothing_else(store: Store) -> None:
    first = make(store, 1, value=5, unit="layer 0")
    same = make(store, 2, value=5, unit="layer 1")
    other = make(store, 3, value=6)
    assert first.digest == same.digest
    assert first.key != same.key
    assert other.digest != first.digest


def test_attrs_count_in_the_digest_and_info_does_not(store: Store) -> None:
    digests = {}
    for name, attrs, info in [("a", 1, 1), ("b", 1, 2), ("c", 2, 1)]:
        key = recipe_key({"name": name})
        with store.draft(key=key, stage="evaluate", unit="m", recipe={}, inputs={}) as draft:
            draft.attrs["perplexity"], draft.info["seconds"] = attrs, info
        digests[name] = draft.manifest.digest
    assert digests["a"] == digests["b"] != digests["c"]


def test_a_manifest_comes_back_from_its_json(store: Store) -> None:
    made = make(store, 3, of=[make(store, 2)])
    assert Manifest.from_json(made.to_json(), "here") == made
    assert store.peek(made.key) == store.find(made.key) == store.open(made.key).manifest == made
    assert made.nbytes == sum(record.size for record in made.files.values())
    assert store.check(made) == []


def test_unknown_keys_are_absent_and_bad_ones_are_refused(store: Store) -> None:
    assert store.find("0" * 64) is store.peek("0" * 64) is None
    with pytest.raises(ArtifactMissingError, match="no artifact with key 000000000000"):
        store.open("0" * 64)
    with pytest.raises(StorageError, match="64 lower-case hexadecimal"):
        store.find("../../etc")


@pytest.mark.parametrize("path", ["/abs", "../up", "a/../../b", ""])
def test_payload_files_cannot_leave_the_artifact(store: Store, path: str) -> None:
    with (
        pytest.raises(StorageError, match="below the artifact"),
        store.draft(key="a" * 64, stage="x", unit="u", recipe={}, inputs={}) as draft,
    ):
        draft.add_file(path)


@pytest.mark.parametrize(
    ("array", "logical", "message"),
    [
        (np.array(["a"]), None, "only bool, integers"),
        (np.array([object()]), None, "only bool, integers"),
        (np.zeros(2, np.float32), "bfloat16", "cannot hold bfloat16"),
        (np.zeros(2, np.uint16), "float7", "cannot hold float7"),
    ],
)
def test_what_cannot_be_stored_exactly_is_refused(
    store: Store, array: np.ndarray, logical: str | None, message: str
) -> None:
    with (
        pytest.raises(StorageError, match=message),
        store.draft(key="a" * 64, stage="x", unit="u", recipe={}, inputs={}) as draft,
    ):
        draft.put("x", array, logical)
    assert store.find("a" * 64) is None


def test_candidates_are_the_earlier_artifacts_of_a_unit_newest_first(store: Store) -> None:
    made = []
    for seed in range(3):
        made.append(make(store, seed, unit="layer 7"))
        time.sleep(0.002)
    make(store, 9, unit="layer 8")
    assert store.candidates("decompose", "layer 7") == made[::-1]
    store.rebuild_index()
    assert store.candidates("decompose", "layer 7") == made[::-1]
    store.remove(made[1].key)
    assert store.candidates("decompose", "layer 7") == [made[2], made[0]]
    assert store.candidates("decompose", "nobody") == []


def test_a_lost_index_is_made_again_when_the_store_is_opened(store: Store) -> None:
    made = make(store, 1)
    for entry in sorted((store.root / "index").rglob("*"), reverse=True):
        entry.rmdir() if entry.is_dir() else entry.unlink()
    (store.root / "index").rmdir()
    assert Store(store.root).candidates("decompose", "layer 0") == [made]


def test_a_prefix_resolves_only_when_it_is_unique(store: Store) -> None:
    made = [make(store, seed) for seed in range(3)]
    assert store.resolve(made[0].key[:12]) == made[0]
    with pytest.raises(ArtifactMissingError, match="too short"):
        store.resolve(made[0].key[:3])
    with pytest.raises(ArtifactMissingError, match="no key starts with"):
        store.resolve("0123456789")
    twin = made[0].key[:8] + "0" * 56
    with store.draft(key=twin, stage="collect", unit="u", recipe={}, inputs={}):
        pass
    with pytest.raises(ArtifactMissingError, match=r"2 keys start with .*collect .*decompose"):
        store.resolve(twin[:8])


def test_lineage_lists_every_ancestor_once_and_marks_the_lost_ones(store: Store) -> None:
    root = make(store, 0, stage="collect")
    left, right = (make(store, n, stage="weigh", of=[root]) for n in (1, 2))
    leaf = make(store, 3, of=[left, right])
    assert store.lineage(leaf.key) == [leaf, left, right, root]
    store.remove(root.key)
    lost = MissingArtifact(root.key, root.digest, "input 0")
    assert store.lineage(leaf.key) == [leaf, left, right, lost]


def test_manifests_of_a_stage(store: Store) -> None:
    made = [make(store, n, stage="weigh") for n in range(3)]
    make(store, 0, stage="collect")
    assert sorted(m.key for m in store.manifests("weigh")) == sorted(m.key for m in made)
    assert len(list(store.manifests())) == 4


def test_garbage_is_what_no_root_was_made_from(store: Store) -> None:
    base = make(store, 0, stage="collect")
    kept = make(store, 1, of=[base])
    loose = make(store, 2, of=[base])
    dry = collect_garbage(store, [kept.key, "f" * 64], dry_run=True)
    assert [m.key for m in dry.removed] == [loose.key]
    assert store.find(loose.key) == loose
    assert collect_garbage(store, [kept.key, "f" * 64], dry_run=False) == dry
    assert (dry.freed_bytes, dry.kept, dry.orphans) == (loose.nbytes, 2, [])
    assert store.find(loose.key) is None
    assert store.find(kept.key) == kept
    assert store.find(base.key) == base


def test_the_format_is_written_down(store: Store) -> None:
    assert read_record(store.root / "FORMAT.json") == {"format": 1}
