"""How tasks are asked: by the path of a YAML, with examples, through a chat template."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compress_core.errors import ConfigError, ModelError
from compress_core.hf.lm_eval_tasks import find_tasks, run_tasks
from tests.pipeline import pico

LETTERS = "abcdefghijklmnopqrstuvwxyz "
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: rows.jsonl, train: rows.jsonl}}}}
test_split: test
fewshot_split: train
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
{more}
"""
CHOICE = 'doc_to_choice: ["ab", "cd"]\n'
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = (json.dumps({"question": "ab" * (i + 1), "answer": i % 2}) for i in range(6))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return tmp_path


def task(
    folder: Path,
    name: str = "one",
    kind: str = "multiple_choice",
    text: str = "{{question}}",
    more: str = CHOICE,
) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(TASK.format(name=name, kind=kind, text=text, more=more))
    return str(path)


def letters(**special: str) -> PreTrainedTokenizerFast:
    vocabulary = {letter: i for i, letter in enumerate(["<s>", "<unk>", *LETTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def model(vocabulary: int = 29, **config: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=512,
            initializer_range=0.5,
            **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **config},
        )
    ).eval()


def prompts(monkeypatch: pytest.MonkeyPatch, tokenizer: Any, specs: Any, **how: Any) -> list[str]:
    """The contexts that lm-eval asks the model about."""
    from lm_eval.models.huggingface import HFLM

    asked: list[str] = []

    def answer(self: Any, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        asked.extend(request.args[0] for request in requests)
        return [(0.0, True)] * len(requests)

    monkeypatch.setattr(HFLM, "loglikelihood", answer)
    run_tasks(model(), tokenizer, specs, **how)
    return asked


def test_examples_come_before_each_question(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = find_tasks([task(folder)])
    tokenizer = letters(bos_token="<s>", eos_token="<s>")
    bare = prompts(monkeypatch, tokenizer, specs)
    shown = prompts(monkeypatch, tokenizer, specs, num_fewshot=2)
    assert sorted(set(bare), key=len) == ["ab" * (i + 1) for i in range(6)]
    assert all(prompt.count("\n\n") == 2 for prompt in shown)
    assert all(after.endswith(before) for before, after in zip(bare, shown, strict=True))
    assert shown == prompts(monkeypatch, tokenizer, specs, num_fewshot=2), "the same each time"


def test_a_task_that_says_none_is_asked_with_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = find_tasks([task(folder, more=CHOICE + "num_fewshot: 0\n")])
    tokenizer = letters(bos_token="<s>", eos_token="<s>")
    asked = prompts(monkeypatch, tokenizer, specs, num_fewshot=2)
    assert not any("\n\n" in prompt for prompt in asked)
    assert specs[0].fixed_shots() == ["one"]


def test_prompts_go_through_the_chat_template(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = find_tasks([task(folder)])
    tokenizer = letters(bos_token="<s>", eos_token="<s>")
    tokenizer.chat_template = TEMPLATE
    asked = prompts(monkeypatch, tokenizer, specs, apply_chat_template=True, num_fewshot=1)
    assert all(prompt.startswith("user ") for prompt in asked)
    assert all("assistant " in prompt for prompt in asked), "examples are turns of their own"


def test_a_group_by_its_path_finds_what_lies_beside_it(folder: Path) -> None:
    task(folder, "one"), task(folder, "two")
    (folder / "both.yml").write_text(
        "group: both\ntask: [one, two]\naggregate_metric_list: [{metric: acc}]\n"
    )
    (spec,) = find_tasks([str(folder / "both.yml")])
    found = run_tasks(model(), letters(bos_token="<s>", eos_token="<s>"), [spec])
    assert set(found) == {"both", "one", "two"}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.yaml", None, r"task file .*none\.yaml does not exist; check the path"),
        ("torn.yaml", "task: [torn\n", r"task file .*torn\.yaml is no task of lm-eval: "),
        ("list.yaml", "- a\n", r"list\.yaml is no task of lm-eval: "),
        ("other.yaml", "colour: red\n", r"other\.yaml is no task of lm-eval: "),
        ("code.yaml", "task: a\nx: !function no.such\n", r"code\.yaml: .*no"),
        ("cycle.yaml", "include: cycle.yaml\n", r"cycle\.yaml is no task of lm-eval: Include"),
        ("binary.yaml", b"\xff\xfe\x00", r"binary\.yaml is no task of lm-eval: "),
        ("./", None, r"is a folder: give the path of a YAML, or --task-path"),
    ],
)
def test_a_file_that_is_no_task_is_one_line(
    name: str, content: str | bytes | None, said: str, tmp_path: Path
) -> None:
    if content is not None:
        text = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(text)
    with pytest.raises(ConfigError, match=said) as caught:
        find_tasks([f"{tmp_path}/{name}"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"num_fewshot": 99},
        {"text": "{{ 1 // 0 }}"},
        {"text": "{{ nothing.at.all }}"},
        {"more": 'doc_to_choice: "{{none}}"\n'},
        {"more": CHOICE + "metric_list: [{metric: nonesuch}]\n"},
        {"kind": "guess"},
    ],
)
def test_a_task_that_cannot_be_run_is_one_line(folder: Path, change: dict[str, Any]) -> None:
    shots = change.pop("num_fewshot", None)
    specs = find_tasks([task(folder, **change)])
    tokenizer = letters(bos_token="<s>", eos_token="<s>")
    with pytest.raises(ConfigError, match=r"^task one cannot be (run|loaded): ") as caught:
        run_tasks(model(), tokenizer, specs, num_fewshot=shots)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("special", [{}, {"unk_token": "<unk>"}, {"pad_token": "<s>"}])
def test_a_tokenizer_without_special_tokens_is_enough_where_none_is_needed(
    special: dict[str, str], folder: Path
) -> None:
    specs = find_tasks([task(folder)])
    named = run_tasks(model(), letters(bos_token="<s>", eos_token="<s>"), specs)
    assert run_tasks(model(), letters(**special), specs, batch_size=3) == named


def test_what_a_task_needs_and_the_tokenizer_lacks_is_said(folder: Path) -> None:
    starts = find_tasks([task(folder, text="")])
    ends = find_tasks(
        [task(folder, "story", "generate_until", more="generation_kwargs: {max_gen_toks: 4}")]
    )
    for specs, verb in ((starts, "begin"), (ends, "end")):
        with pytest.raises(ModelError, match=f"has no token to {verb} a text with"):
            run_tasks(model(), letters(), specs)
        run_tasks(model(bos_token_id=0, eos_token_id=0), letters(), specs)


def test_tokens_beyond_the_embedding_are_refused_before_they_are_looked_up(folder: Path) -> None:
    tokenizer = letters(bos_token="<s>", eos_token="<s>")
    with pytest.raises(ModelError, match="gives token 4 and the model's embedding ends at 2"):
        run_tasks(model(3), tokenizer, find_tasks([task(folder)]))


def test_how_tasks_are_asked_decides_what_is_cached(
    folder: Path, inputs: pico.Inputs, home: Path
) -> None:
    given: dict[str, Any] = {"method": "svd", "calibration": None, "eval_text": [], "kept": 0.9}
    common = inputs.settings(home, tasks=[task(folder)], task_limit=2, **given)
    keys = [
        pico.walk(common | change).keys["evaluate", "dense on task one"]
        for change in ({}, {}, {"num_fewshot": 1}, {"num_fewshot": 2})
    ]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3
    with pytest.raises(ConfigError, match=r"--apply-chat-template: .* has no chat template"):
        pico.build(common | {"apply_chat_template": True})
    notes = pico.build(
        common | {"num_fewshot": 1, "tasks": [task(folder, "zero", more="num_fewshot: 0\n")]}
    )[2]
    assert any(note.startswith("--num-fewshot 1 leaves out zero: ") for note in notes)
