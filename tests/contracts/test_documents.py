"""From a source to documents: what each kind gives, and what each mistake says."""

import json
from pathlib import Path

import datasets
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from compress_core.errors import TextError
from compress_core.hf.text import read_documents

CHATS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"


def _jsonl(path: Path, *records: object) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return str(path)


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\r\ntwo\n".encode())
    assert read_documents(str(tmp_path / "a.txt")).texts == ["one\n\ntwo\n"]


def test_json_lines_and_parquet_give_the_same_documents(tmp_path: Path) -> None:
    # A line separator inside a string ends no record, blank lines are none, empty records stay.
    texts = ["one\u2028still one", "", "three"]
    path = _jsonl(tmp_path / "a.jsonl", *({"text": t, "id": 1} for t in texts))
    Path(path).write_text(Path(path).read_text() + "\n\n")
    data = datasets.Dataset.from_dict({"text": texts, "body": ["x", "y", "z"]})
    data.to_parquet(str(tmp_path / "a.parquet"))
    assert read_documents(path).texts == texts
    assert read_documents(str(tmp_path / "a.parquet")).texts == texts
    assert read_documents(str(tmp_path / "a.parquet"), "body").texts == ["x", "y", "z"]


def test_chats_go_through_the_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel()))
    path = _jsonl(tmp_path / "chat.jsonl", {"messages": chat})
    with pytest.raises(TextError, match=r"line 1: field 'messages'.*no chat template"):
        read_documents(path, tokenizer=tokenizer)
    monkeypatch.setattr(tokenizer, "chat_template", CHATS)
    assert read_documents(path, tokenizer=tokenizer).texts == ["<user>hi\n<assistant>yes\n"]
    data = datasets.Dataset.from_dict({"messages": [chat]})
    data.to_parquet(str(tmp_path / "chat.parquet"))
    rendered = read_documents(str(tmp_path / "chat.parquet"), "messages", tokenizer=tokenizer)
    assert rendered.texts == ["<user>hi\n<assistant>yes\n"]
    refusing = "{{ raise_exception('roles must alternate') }}"
    monkeypatch.setattr(tokenizer, "chat_template", refusing)
    with pytest.raises(TextError, match="refuses it: roles must alternate"):
        read_documents(path, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", None, "does not exist"),
        ("a.jsonl", None, "does not exist"),
        ("a.parquet", None, "does not exist"),
        ("folder/a", None, "does not exist"),
        ("a.txt", b" \n", "holds no text"),
        ("a.txt", b"ab\xff", "not UTF-8 at byte 2"),
        ("a.pdf", b"x", r"cannot read a \.pdf file; give \.txt, \.md, \.jsonl, .* or \.arrow"),
        ("a", b"x", "cannot read a nameless file"),
        ("a.jsonl", b"", "holds no text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n["x"]', "2 rows is no document: line 3 is a list"),
        (
            "a.jsonl",
            b'{"body": "x", "id": 1}',
            "no row has a field 'text'; .* body, id; .*'body'",
        ),
        ("a.jsonl", b'{"text": "x"}\n{"text": null}', "line 2 has null as 'text'"),
        ("a.jsonl", b'{"text": ["x"]}', "line 1 has a list as 'text', but not of messages"),
        ("a.parquet", b"nonsense", "cannot be read as parquet"),
    ],
)
def test_every_bad_file_is_one_clear_line(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TextError, match=message) as caught:
        read_documents(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="is a folder without texts"):
        read_documents(str(tmp_path))


def test_a_dataset_id_names_configuration_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, config: str | None, *, split: str) -> datasets.Dataset:
        asked.append((name, config, split))
        return datasets.Dataset.from_dict({"text": ["x", "y"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_documents("owner/name", split="test").texts == ["x", "y"]
    read_documents("owner/name-1.0:config")
    read_documents("owner/name:config:validation")
    read_documents("name::test")
    assert asked == [
        ("owner/name", None, "test"),
        ("owner/name-1.0", "config", "train"),
        ("owner/name", "config", "validation"),
        ("name", None, "test"),
    ]
    with pytest.raises(TextError, match="got 4 parts"):
        read_documents("a:b:c:d")


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach the Hub\nand more"),
        ValueError("BuilderConfig 'x' not found."),
        datasets.exceptions.DatasetNotFoundError("no such dataset"),
        datasets.exceptions.DatasetGenerationError("broken"),
    ],
)
def test_a_dataset_that_cannot_be_loaded_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def load(*_args: object, **_options: object) -> datasets.Dataset:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(TextError, match=r"owner/name .*cannot be loaded as a dataset") as caught:
        read_documents("owner/name")
    assert "\n" not in str(caught.value)
