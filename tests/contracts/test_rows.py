"""Every kind of file gives the same documents, and a damaged one a line about itself."""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pytest

from compress_core.errors import TextError
from compress_core.hf.documents import read_documents, source_files, source_format

TEXTS = ['one, "quoted"\nand more', "zwei\ttab", "three"]
RECORDS = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]
LINES = "\n".join(json.dumps(record) for record in RECORDS)


def table(delimiter: str) -> str:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerows([["id", "text"], *([r["id"], r["text"]] for r in RECORDS)])
    return out.getvalue()


def zstandard(data: bytes) -> bytes:
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as file:
        file.write(data)
    return bytes(out.getvalue().to_pybytes())


BY_NAME = {
    "a.jsonl": LINES,
    "a.ndjson": LINES + "\n",
    "lines.json": LINES,
    "list.json": json.dumps(RECORDS, indent=2),
    "data.json": json.dumps({"version": "1", "data": RECORDS}),
    "train.json": json.dumps({"train": RECORDS, "licence": "none"}),
    "a.csv": table(","),
    "A.TSV": table("\t"),
}
PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard,
}


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("name", BY_NAME)
def test_all_kinds_of_files_hold_the_same(name: str, packed: str, tmp_path: Path) -> None:
    path = tmp_path / (name + packed)
    path.write_bytes(PACKED[packed](BY_NAME[name].encode()))
    assert read_documents(str(path)).texts == TEXTS
    assert source_format(str(path)) == "." + name.lower().split(".")[1] + packed


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.txt.gz", "a.md.zst"])
def test_plain_text_is_one_document(name: str, tmp_path: Path) -> None:
    pack = PACKED[Path(name).suffix if name.count(".") > 1 else ""]
    (tmp_path / name).write_bytes(pack(b"\xef\xbb\xbfone\r\ntwo"))
    assert read_documents(str(tmp_path / name)).texts == ["one\ntwo"]
    assert read_documents(str(tmp_path / name), "column").texts == ["one\ntwo"]


def test_saved_datasets_are_read_where_they_are(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list(RECORDS)
    data.save_to_disk(str(tmp_path / "one"))
    both = datasets.DatasetDict({"train": data, "test": data.select([0])})
    both.save_to_disk(str(tmp_path / "both"))
    datasets.DatasetDict({"only": data}).save_to_disk(str(tmp_path / "only"))
    (arrow,) = (tmp_path / "one").glob("*.arrow")
    before = {path for path in tmp_path.rglob("*")}
    for place in (tmp_path / "one", tmp_path / "only", tmp_path / "both" / "train", arrow):
        assert read_documents(str(place)).texts == TEXTS
    with pytest.raises(TextError, match=r"the splits train, test: give one of them, like .*/train"):
        read_documents(str(tmp_path / "both"))
    assert {path for path in tmp_path.rglob("*")} == before
    assert arrow in source_files(str(tmp_path / "one"))


def test_a_folder_of_shards_is_one_text_in_the_order_of_names(tmp_path: Path) -> None:
    for name, record in zip(["b.jsonl", "a.jsonl"], RECORDS, strict=False):
        (tmp_path / name).write_text(json.dumps(record))
    (tmp_path / "README.md").write_text("# not text")
    (tmp_path / "info.json").write_text("{}")
    assert read_documents(str(tmp_path)).texts == [TEXTS[1], TEXTS[0]]
    (tmp_path / "a.jsonl").write_text(LINES + "\n[1]")
    with pytest.raises(TextError, match=r"1 of 5 rows is no document: a\.jsonl line 4 is a list"):
        read_documents(str(tmp_path))
    (tmp_path / "c.parquet").write_bytes(b"")
    with pytest.raises(TextError, match=r"several kinds \(\.jsonl, \.parquet\): give one file"):
        read_documents(str(tmp_path))
    for name in ("b.jsonl", "a.jsonl", "c.parquet"):
        (tmp_path / name).unlink()
    for name in ("train-0.jsonl", "train-1.jsonl", "dev.jsonl"):
        (tmp_path / name).write_text(LINES)
    with pytest.raises(TextError, match="the splits train, validation: give a file, or a folder"):
        read_documents(str(tmp_path))


UTF16 = "\n".join(TEXTS).encode("utf-16")
DAMAGED: dict[str, tuple[str, bytes, str]] = {
    "gzip cut short": ("a.txt.gz", gzip.compress(b"x" * 999)[:-9], "cannot be read as .gz: "),
    "no gzip": ("a.jsonl.gz", b"plain", "cannot be read as .gz: "),
    "zstandard cut short": ("a.txt.zst", zstandard(b"x" * 999)[:-3], "cannot be read as .zst: "),
    "no zstandard": ("a.csv.zst", b"plain", "cannot be read as .zst: "),
    "xz cut short": ("a.json.xz", lzma.compress(b"[]")[:-3], "cannot be read as .xz: "),
    "no bzip": ("a.txt.bz2", b"plain", "cannot be read as .bz2: "),
    "no parquet": ("a.parquet", b"PAR1", "cannot be read as parquet: "),
    "no Arrow": ("a.arrow", b"ARROW1", "cannot be read as Arrow: "),
    "UTF-16": ("a.txt", UTF16, "is UTF-16, not UTF-8; convert it first"),
    "UTF-16 of records": ("a.jsonl", UTF16, "is UTF-16, not UTF-8; convert it first"),
    "UTF-16 without mark": ("a.txt", UTF16[2:], "holds a NUL at character 1: it is binary"),
    "binary": ("a.md", b"\x00\x01\x02", "holds a NUL at character 0: it is binary"),
    "Latin 1": ("a.csv", b"text\ncaf\xe9\n", "is not UTF-8 at byte 8; convert it first"),
    "JSON cut short": ("a.json", json.dumps(RECORDS).encode()[:-5], "is not JSON at line 1: "),
    "a number": ("a.json", b"5", "holds a number; expected a list of records"),
    "too deep": ("a.json", b"[" * 10**5, "is not JSON that can be read: Recursion"),
    "two lists": (
        "a.json",
        json.dumps({"train": RECORDS, "test": RECORDS}).encode(),
        "holds several lists of records (train, test)",
    ),
    "an open quote": ("a.csv", b'text\n"open\n', "cannot be read as a table: "),
    "two columns of a name": ("a.csv", b"text,text\n1,2\n", "has two columns called 'text'"),
    "an empty table": ("a.csv", b"", "holds no text; give a source with some"),
    "an empty list": ("a.json", b"[]", "holds no text; give a source with some"),
    "an unknown kind": ("a.pdf", b"%PDF", "cannot read a .pdf file; give .txt, .md, "),
    "an unknown kind, packed": ("a.tar.gz", b"", "cannot read a .tar.gz file; give .txt"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_what_cannot_be_read_is_one_line_about_the_file(damage: str, tmp_path: Path) -> None:
    name, content, said = DAMAGED[damage]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(TextError) as caught:
        read_documents(str(path))
    assert str(caught.value).startswith(str(path))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("~nobody-at-all/a.txt", "cannot be read: "),
        ("x" * 300 + ".txt", "cannot be read: File name too long"),
        ("/dev/null", "cannot read a nameless file"),
        ("none.csv", "does not exist; check the path"),
        ("none.jsonl.gz", "does not exist; check the path"),
    ],
)
def test_a_place_that_holds_no_file_is_one_line(source: str, said: str) -> None:
    with pytest.raises(TextError, match=said) as caught:
        read_documents(source)
    assert "\n" not in str(caught.value)
