"""What every backend of a shared store does: six verbs, each with one meaning."""

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from obstore.store import MemoryStore

from storage.errors import ObjectsError, StorageError
from storage.objects import FolderObjects, Objects, objects_at, parse_address
from storage.s3 import PART, LibraryObjects
from tests.pipeline import pico
from tests.s3_server import Server


class Contract:
    """A new backend has a class below with its own `objects`."""

    @pytest.fixture
    def objects(self) -> Objects:
        raise NotImplementedError

    def test_what_is_put_is_read_back(self, objects: Objects) -> None:
        assert objects.create("a/b", b"one")
        objects.send("a/c", iter([b"two", b"", b" three"]), 9)
        assert (objects.read("a/b"), objects.read("a/c")) == (b"one", b"two three")

    def test_create_never_replaces(self, objects: Objects) -> None:
        assert objects.create("a", b"first")
        assert not objects.create("a", b"second")
        assert objects.read("a") == b"first"

    def test_send_replaces(self, objects: Objects) -> None:
        objects.send("a", [b"first"], 5)
        before = objects.stat("a")
        objects.send("a", [b"later"], 5)
        after = objects.stat("a")
        assert objects.read("a") == b"later"
        assert before and after and before.version != after.version

    def test_of_many_who_create_at_once_one_does(self, objects: Objects) -> None:
        gate, made = threading.Barrier(6), []

        def work(number: int) -> None:
            gate.wait()
            if objects.create("race", str(number).encode()):
                made.append(number)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(made) == 1
        assert objects.read("race") == str(made[0]).encode()

    @pytest.mark.parametrize(
        ("start", "length", "found"),
        [
            (0, 4, b"0123"),
            (3, 4, b"3456"),
            (8, 4, b"89"),
            (10, 4, b""),
            (12, 4, b""),
            (3, 0, b""),
            (4, None, b"456789"),
        ],
    )
    def test_a_part_ends_where_the_object_ends(
        self, objects: Objects, start: int, length: int | None, found: bytes
    ) -> None:
        objects.create("digits", b"0123456789")
        assert objects.read("digits", start, length) == found

    def test_an_empty_object_is_one(self, objects: Objects) -> None:
        assert objects.create("empty", b"")
        found = objects.stat("empty")
        assert found is not None and found.size == 0
        assert objects.read("empty") == b""
        assert not objects.create("empty", b"")

    def test_what_is_not_there_is_missing(self, objects: Objects) -> None:
        assert objects.stat("none") is None
        for part in ((), (0, 3), (2, None)):
            with pytest.raises(FileNotFoundError):
                objects.read("none", *part)
        objects.delete(["none"])
        objects.delete([])

    def test_a_listing_is_of_whole_parts_of_names(self, objects: Objects) -> None:
        for name in ("a/1", "a/b/2", "ab/3", "c"):
            objects.create(name, name.encode())
        assert {entry.name for entry in objects.list("a")} == {"a/1", "a/b/2"}
        assert {entry.name for entry in objects.list("a/b")} == {"a/b/2"}
        assert {entry.name for entry in objects.list("")} == {"a/1", "a/b/2", "ab/3", "c"}
        assert list(objects.list("none")) == []

    def test_listing_and_stat_say_the_same(self, objects: Objects) -> None:
        objects.create("a/1", b"four")
        (listed,) = objects.list("a")
        assert listed == objects.stat("a/1")
        assert listed.size == 4
        assert abs(datetime.now(UTC) - listed.modified) < timedelta(minutes=5)

    def test_what_is_deleted_can_be_created_again(self, objects: Objects) -> None:
        objects.create("a/1", b"x")
        objects.create("a/2", b"y")
        objects.delete(["a/1"])
        assert [entry.name for entry in objects.list("a")] == ["a/2"]
        assert objects.create("a/1", b"z")
        assert objects.read("a/1") == b"z"

    def test_a_send_that_breaks_off_leaves_what_there_was(self, objects: Objects) -> None:
        def broken() -> Iterator[bytes]:
            yield b"half"
            raise KeyboardInterrupt

        objects.send("a", [b"whole"], 5)
        with pytest.raises(KeyboardInterrupt):
            objects.send("a", broken(), 9)
        assert objects.read("a") == b"whole"
        assert [entry.name for entry in objects.list("")] == ["a"]

    def test_a_large_object_goes_in_parts(self, objects: Objects) -> None:
        pieces = [bytes([n]) * (PART // 2 + 1) for n in range(3)]
        objects.send("large", iter(pieces), sum(map(len, pieces)))
        found = objects.stat("large")
        assert found is not None and found.size == sum(map(len, pieces))
        assert objects.read("large", PART // 2, 3) == b"\0\1\1"
        assert objects.read("large", found.size - 1, 9) == b"\2"


class TestFolder(Contract):
    @pytest.fixture
    def objects(self, tmp_path: Path) -> Objects:
        return objects_at((tmp_path / "shared").as_uri())

    def test_a_file_in_the_way_is_one_sentence(self, tmp_path: Path) -> None:
        (tmp_path / "shared").write_text("")
        with pytest.raises(StorageError, match="cannot write"):
            FolderObjects(tmp_path / "shared").create("a/b", b"")


class TestMemory(Contract):
    @pytest.fixture
    def objects(self) -> Objects:
        return LibraryObjects(MemoryStore(), "memory://", "memory")


class TestS3(Contract):
    @pytest.fixture
    def objects(self, s3: Server) -> Iterator[Objects]:
        with pico.environment(pico.clean_environment(**s3.environment)):
            yield objects_at(s3.address())


REFUSED = {
    "models/llama": "a store is s3://BUCKET/PREFIX or file:///FOLDER",
    "s3://[bucket/x": "a store is s3://BUCKET/PREFIX or file:///FOLDER",
    "https://bucket/x": "a store is s3://BUCKET/PREFIX",
    "s3://": "names no bucket",
    "s3:///prefix": "names no bucket",
    "s3://a b/prefix": "names no bucket",
    "s3://bucket/a//b": "prefix of",
    "s3://bucket/../b": "prefix of",
    "s3://bucket/a?region=x": "without user, password or parameters",
    "file://host/folder": "file:///FOLDER",
    "file:///": "file:///FOLDER",
}


@pytest.mark.parametrize("address", REFUSED)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ObjectsError, match=REFUSED[address]):
        parse_address(address)


@pytest.mark.parametrize(
    "address", ["s3://AKIDX:hunter22@bucket/x", "s3://bucket/x?secret=hunter22"]
)
def test_a_secret_in_an_address_is_refused_and_not_repeated(address: str) -> None:
    with pytest.raises(ObjectsError, match="credentials are read from the environment") as refused:
        parse_address(address)
    assert "hunter22" not in str(refused.value)


@pytest.mark.parametrize("address", ["s3://bucket", "s3://bucket/", "s3://my.bucket-1/a/b_c=1"])
def test_an_address_is_a_bucket_and_perhaps_a_prefix(address: str) -> None:
    kind, bucket, prefix = parse_address(address)
    assert kind == "s3" and f"s3://{bucket}/{prefix}".rstrip("/") == address.rstrip("/")
