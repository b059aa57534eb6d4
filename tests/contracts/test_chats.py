"""A chat reaches its template with all that its record holds, whatever form that has."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from compress_core.errors import TextError
from compress_core.hf.documents import read_documents

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
CALL = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
DOCUMENTS = [{"title": "t", "text": "d"}]
SEEN = (
    "{% if tools is not none and tools is defined %}T{{ tools | tojson }}{% endif %}"
    "{% if documents %}D{{ documents[0].text }}{% endif %}"
    "{% if style is defined %}S{{ style }}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.tool_calls is defined %}C{{ m.tool_calls[0].function.name }}{% endif %}{% endfor %}"
)
BARE = "<user>hi<assistant>yes"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel()), eos_token="</s>")
    made.chat_template = SEEN
    return made


def render(path: Path, record: dict[str, Any], tokenizer: Any, field: str | None = None) -> str:
    path.write_text(json.dumps(record))
    (text,) = read_documents(str(path), field, tokenizer=tokenizer).texts
    return text


WITH_TOOLS = f"T{json.dumps(TOOLS)}{BARE}"


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, BARE),
        ({"tools": TOOLS}, WITH_TOOLS),
        ({"tools": json.dumps(TOOLS)}, WITH_TOOLS),
        ({"tools": [json.dumps(tool) for tool in TOOLS]}, WITH_TOOLS),
        ({"tools": TOOLS[0]}, WITH_TOOLS),
        ({"tools": None, "documents": None, "style": None}, BARE),
        ({"tools": [], "documents": "[]"}, BARE),
        ({"documents": DOCUMENTS}, "Dd" + BARE),
        ({"documents": json.dumps(DOCUMENTS)}, "Dd" + BARE),
        ({"style": "terse"}, "Sterse" + BARE),
        ({"chat_template_kwargs": {"style": "terse"}}, "Sterse" + BARE),
        ({"chat_template_kwargs": '{"style": "terse"}'}, "Sterse" + BARE),
        ({"chat_template": "{{ 1 }}", "tokenize": True, "eos_token": "x", "id": 7}, BARE),
    ],
)
def test_a_template_gets_what_its_record_holds(
    more: dict[str, Any], expected: str, tokenizer: Any, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    assert render(path, {"messages": CHAT, **more}, tokenizer) == expected
    assert render(path, {"messages": json.dumps(CHAT), **more}, tokenizer) == expected
    assert render(path, {"talk": CHAT, **more}, tokenizer, "talk") == expected


def test_the_gaps_of_arrow_are_no_fields(tokenizer: Any, tmp_path: Path) -> None:
    records = [{"messages": CHAT, "tools": TOOLS}, {"messages": CALL, "tools": None}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    datasets.Dataset.from_list(records).to_parquet(str(tmp_path / "a.parquet"))
    found = [
        read_documents(str(tmp_path / f"a.{kind}"), tokenizer=tokenizer).texts
        for kind in ("jsonl", "parquet")
    ]
    assert found[0] == found[1]
    assert found[0][1] == "<user>hi<assistant>Cf"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"tools": "f(x)"}, "line 1 has 'tools' that are not JSON: "),
        ({"tools": 5}, "line 1 has a number as 'tools'; expected a list"),
        ({"tools": [5]}, "line 1 has a chat, but the chat template refuses it: "),
        ({"documents": ["no object"]}, "line 1 has 'documents' that are not JSON: "),
        ({"chat_template_kwargs": 5}, "line 1 has a number as 'chat_template_kwargs'"),
    ],
)
def test_what_no_template_takes_is_a_bad_row(
    more: dict[str, Any], said: str, tokenizer: Any, tmp_path: Path
) -> None:
    rows = [{"messages": CHAT, **more}, {"messages": CHAT}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(TextError, match=said):
        read_documents(str(tmp_path / "a.jsonl"), tokenizer=tokenizer)
    found = read_documents(str(tmp_path / "a.jsonl"), tokenizer=tokenizer, skip_bad_rows=1)
    assert found.texts == [BARE]


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].a.b }}",
        "{{ 1 // 0 }}",
        "{{ 'a' + 1 }}",
        "{% for",
        "{{ messages | nonesuch }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_whatever_a_template_raises_is_one_line_that_names_the_record(
    template: str, tokenizer: Any, tmp_path: Path
) -> None:
    tokenizer.chat_template = template
    said = r"line 1 has a chat, but the chat template refuses it: "
    with pytest.raises(TextError, match=said) as caught:
        render(tmp_path / "a.jsonl", {"messages": CHAT}, tokenizer)
    assert "\n" not in str(caught.value)


def test_what_the_template_does_not_read_is_said(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    path = tmp_path / "a.jsonl"
    row = json.dumps({"messages": CHAT, "tools": TOOLS, "documents": DOCUMENTS})
    path.write_text("\n".join([row] * 3))
    assert read_documents(str(path), tokenizer=tokenizer).notes == [
        f"{path}: 3 chats have tools, which the chat template does not read",
        f"{path}: 3 chats have documents, which the chat template does not read",
    ]
