"""Rows that are no documents are all counted, named, and left out only where that was asked."""

import json
from pathlib import Path

import datasets
import pytest

from compress_core.errors import TextError
from compress_core.hf.documents import read_documents
from tests.pipeline import pico

BAD = {
    '{"text": null}': "has null as 'text'; expected a string",
    '{"text": 5}': "has a number as 'text'; expected a string",
    '{"text": {"a": 1}}': "has an object as 'text'; expected a string",
    '{"text": ["a"]}': "has a list as 'text', but not of messages with a role",
    '{"txet": "a"}': "has no field 'text'",
    '{"text": ': "is not JSON: Expecting value",
    "[1]": "is a list; expected an object with fields",
    "null": "is null; expected an object with fields",
    '{"text": "\\ud800"}': "has half a character",
}


def lines(path: Path, bad: list[str], good: int = 20) -> str:
    rows = [json.dumps({"text": f"words {i}"}) for i in range(good)]
    path.write_text("\n".join([*rows[:2], *bad, *rows[2:]]))
    return str(path)


@pytest.mark.parametrize("row", BAD)
def test_a_bad_row_says_what_is_wrong_and_can_be_left_out(row: str, tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", [row])
    with pytest.raises(TextError) as caught:
        read_documents(source)
    assert str(caught.value).startswith(f"{source}: 1 of 21 rows is no document: line 3 {BAD[row]}")
    assert str(caught.value).endswith("; mend them, or leave them out with --skip-bad-rows 1")
    found = read_documents(source, skip_bad_rows=1)
    assert found.texts == [f"words {i}" for i in range(20)]
    assert found.places[2] == "line 4"
    (note,) = found.notes
    assert note.startswith(f"1 of 21 rows of {source} are left out: line 3 {BAD[row]}")


def test_all_bad_rows_are_counted_and_the_first_few_named(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", list(BAD))
    with pytest.raises(
        TextError, match=r"9 of 29 rows are no documents: .*; \.\.\.; .* 9$"
    ) as told:
        read_documents(source)
    assert str(told.value).count("line ") == 3
    assert len(read_documents(source, skip_bad_rows=9).texts) == 20


def test_bytes_that_are_no_text_spoil_one_row(tmp_path: Path) -> None:
    source = Path(lines(tmp_path / "a.jsonl", ['{"text": "BYTES"}']))
    source.write_bytes(source.read_bytes().replace(b"BYTES", b"\xff"))
    with pytest.raises(TextError, match="1 of 21 rows is no document: line 3 is not UTF-8 at its"):
        read_documents(str(source))
    assert len(read_documents(str(source), skip_bad_rows=0.05).texts) == 20


@pytest.mark.parametrize(
    ("allowed", "most"), [(1, 1), (2, 2), (0.1, 2), (0.13, 2), (0.14, 3), (4, 4), (0.9, 19)]
)
def test_the_allowance_is_a_count_or_a_share(allowed: float, most: int, tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", ["null"] * 3, good=19)  # 22 rows
    if most >= 3:
        assert len(read_documents(source, skip_bad_rows=allowed).texts) == 19
        return
    said = rf"--skip-bad-rows 3 \(--skip-bad-rows {allowed:g} allows {most}\)$"
    with pytest.raises(TextError, match=said):
        read_documents(source, skip_bad_rows=allowed)


def test_rows_of_tables_and_parquet_are_counted_alike(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,text\n1,a\n2\n3,b,c\n4,d\n")
    with pytest.raises(
        TextError, match=r"2 of 4 rows .* line 3 has 1 cells for 2 columns; line 4 "
    ):
        read_documents(str(tmp_path / "a.csv"))
    data = datasets.Dataset.from_dict({"text": ["a", None, "b"]})
    data.to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(TextError, match="1 of 3 rows is no document: row 2 has null as 'text'"):
        read_documents(str(tmp_path / "a.parquet"))


def test_where_no_row_is_a_document_nothing_is_left_out(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", ["null"] * 3, good=0)
    with pytest.raises(TextError, match=r"none of its rows \(3\) is a document: line 1 is null"):
        read_documents(source)
    with pytest.raises(TextError, match="holds no text"):
        read_documents(source, skip_bad_rows=3)


@pytest.mark.parametrize(
    ("record", "field", "said"),
    [
        ({"body": "a", "id": 1}, None, "no row has a field 'text'; the fields there are: body, id"),
        ({"body": "a", "id": 1}, None, r"with --eval-field \(perhaps 'body'\)$"),
        ({"Text": "a", "b": "c"}, None, r"\(perhaps 'Text'\)$"),
        ({"content": "a", "title": "c"}, "contents", r"\(perhaps 'content'\)$"),
        ({"a": "x", "b": "y"}, None, "the fields there are: a, b; .* with --eval-field$"),
        ({}, None, "the fields there are: none"),
    ],
)
def test_a_field_that_is_not_there_names_those_that_are(
    record: dict[str, object], field: str | None, said: str, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps(record)] * 3))
    with pytest.raises(TextError, match=said):
        read_documents(
            str(tmp_path / "a.jsonl"), field, skip_bad_rows=0.5, field_setting="--eval-field"
        )


def test_what_was_left_out_is_told_each_time_and_the_allowance_is_in_the_key(
    inputs: pico.Inputs, home: Path, tmp_path: Path
) -> None:
    from flows.runs.workspace import open_workspace, read_texts
    from flows.settings.config import RunConfig

    text = inputs.calibration.read_text().splitlines()
    rows = [*(json.dumps({"text": line}) for line in text), "null"]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))

    def notes(**more: object) -> list[str]:
        config = RunConfig(**inputs.settings(home, calibration=str(tmp_path / "a.jsonl"), **more))
        workspace = open_workspace(config)
        read_texts(workspace, needs_calibration=True)
        return list(workspace.notes)

    for _ in ("computed", "cached"):
        (note,) = notes(skip_bad_rows=1)
        assert note.startswith(f"1 of {len(rows)} rows of {tmp_path / 'a.jsonl'} are left out: ")
    with pytest.raises(TextError, match=r"^calibration text .*a\.jsonl: 1 of "):
        notes()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"
