"""lm-eval tasks from a folder: found by name, anchored there, known by content, run offline."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compress_core.errors import ConfigError, NumericsError
from compress_core.hf.lm_eval_tasks import find_tasks, run_tasks
from tests.patience import PATIENCE

LETTERS = "abcdefghijklmnopqrstuvwxyz"
CHOICE = """
task: {name}
tag: little
dataset_path: json
dataset_kwargs: {{data_files: {{test: data/{name}.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
WORD = """
task: word
dataset_path: json
dataset_kwargs: {data_files: [data/one.jsonl, data/two.jsonl]}
test_split: train
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: !function words.last
target_delimiter: ""
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
"""
GROUP = """
group: both
task: [one, two]
aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: false}]
"""
STORY = """
task: story
dataset_path: json
dataset_kwargs: {data_files: data/one.jsonl}
test_split: train
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "x"
generation_kwargs: {max_gen_toks: 64}
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "tasks"
    (path / "data").mkdir(parents=True)
    for seed, name in enumerate(["one", "two"]):
        records = [_record(seed * 100 + i) for i in range(10)]
        lines = "\n".join(json.dumps(record) for record in records)
        (path / "data" / f"{name}.jsonl").write_text(lines)
        (path / f"{name}.yaml").write_text(CHOICE.format(name=name))
    (path / "word.yaml").write_text(WORD)
    (path / "words.py").write_text("def last(doc):\n    return doc['choices'][0]\n")
    (path / "both.yaml").write_text(GROUP)
    (path / "story.yaml").write_text(STORY)
    return path


def _record(i: int) -> dict[str, Any]:
    def word(j: int) -> str:
        return "".join(LETTERS[(i * 7 + j * 11 + k * (k + i + j)) % 26] for k in range(5))

    return {"question": word(0) * 3, "choices": [word(1), word(2), word(3)], "answer": i % 3}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {letter: i for i, letter in enumerate(["<s>", "<unk>", *LETTERS])}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=letters, bos_token="<s>", eos_token="<s>", unk_token="<unk>"
    )


def _model(seed: int, context: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=28,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=context,
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def _accuracy(model: LlamaForCausalLM, tokenizer: Any, path: Path) -> float:
    """Own transcription: the choice of the largest summed log probability is the answer."""
    right = []
    for line in path.read_text().splitlines():
        record = json.loads(line)
        sums = []
        for choice in record["choices"]:
            ids = torch.tensor([tokenizer(record["question"] + choice)["input_ids"]])
            with torch.no_grad():
                logs = model(ids).logits.log_softmax(-1)[0, :-1]
            by_token = logs.gather(-1, ids[0, 1:, None])
            sums.append(float(by_token[-len(choice) :].sum()))
        right.append(sums.index(max(sums)) == record["answer"])
    return sum(right) / len(right)


def test_accuracy_is_that_of_our_own_transcription(
    folder: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    # Another working directory, a relative task folder, and nothing of it on stdout.
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    specs = find_tasks(["both", "word"], Path("../tasks"))
    monkeypatch.chdir(tmp_path)
    found = {}
    for seed in (0, 1):
        model = _model(seed)
        found[seed] = run_tasks(model, tokenizer, specs, batch_size=4)
        for name in ("one", "two"):
            expected = _accuracy(model, tokenizer, folder / "data" / f"{name}.jsonl")
            assert found[seed][name]["acc"] == pytest.approx(expected)
            assert found[seed][name]["acc_stderr"] == pytest.approx(
                (expected * (1 - expected) / 9) ** 0.5
            )
        mean = (found[seed]["one"]["acc"] + found[seed]["two"]["acc"]) / 2
        assert found[seed]["both"]["acc"] == pytest.approx(mean)
    # A second model never gets the first one's answers.
    assert found[0]["word"]["perplexity"] != found[1]["word"]["perplexity"]
    assert set(found[0]) == {"one", "two", "both", "word"}
    assert capfd.readouterr().out == ""
    assert not model._forward_hooks


def test_a_tag_is_all_its_tasks_and_limit_cuts_them(folder: Path, tokenizer: Any) -> None:
    found = run_tasks(_model(0), tokenizer, find_tasks(["little"], folder), limit=1)
    assert set(found) == {"one", "two"}
    assert all(metrics["acc"] in (0.0, 1.0) for metrics in found.values())
    assert run_tasks(_model(0), tokenizer, []) == {}


def test_prompts_beyond_the_context_are_cut_not_fatal(folder: Path, tokenizer: Any) -> None:
    found = run_tasks(_model(0, context=8), tokenizer, find_tasks(["word"], folder))
    assert found["word"]["perplexity"] > 1
    with pytest.raises(ConfigError, match=r"story generates 64 tokens .* context is 64"):
        run_tasks(_model(0, context=64), tokenizer, find_tasks(["story"], folder))


def test_logits_that_are_not_finite_are_no_answers(folder: Path, tokenizer: Any) -> None:
    model = _model(0)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")
    with pytest.raises(NumericsError, match="not finite in an lm-eval request"):
        run_tasks(model, tokenizer, find_tasks(["one"], folder))
    assert not model._forward_hooks


def _digest(name: str, folder: Path) -> str:
    (spec,) = find_tasks([name], folder)
    return json.dumps(spec.digest_parts, sort_keys=True)


def test_a_task_is_its_content_not_its_place(folder: Path, tmp_path: Path) -> None:
    names = ["one", "word", "both", "little"]
    before = {name: _digest(name, folder) for name in names}
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert {name: _digest(name, moved) for name in names} == before
    assert not any(str(tmp_path) in text for text in before.values())

    def changed() -> set[str]:
        return {name for name in names if _digest(name, folder) != before[name]}

    data = folder / "data" / "two.jsonl"
    kept = data.read_text()
    data.write_text(kept.replace('"answer": 1', '"answer": 2'))
    assert changed() == {"word", "both", "little"}
    data.write_text(kept)
    assert changed() == set()
    code = folder / "words.py"
    code.write_text(code.read_text().replace("[0]", "[1]"))
    assert changed() == {"word"}
    settings = folder / "one.yaml"
    settings.write_text(settings.read_text() + "num_fewshot: 0\n")
    assert changed() == {"word", "one", "both", "little"}


def test_a_missing_data_file_is_found_before_anything_runs(folder: Path) -> None:
    (folder / "data" / "two.jsonl").unlink()
    for name in ("two", "word", "both"):
        with pytest.raises(ConfigError, match=r"two\.jsonl does not exist; check data_files"):
            find_tasks([name], folder)
    assert [spec.name for spec in find_tasks(["one"], folder)] == ["one"]


def test_a_pattern_stands_for_its_files(folder: Path) -> None:
    text = (folder / "one.yaml").read_text().replace("data/one.jsonl", "data/*.jsonl")
    (folder / "one.yaml").write_text(text)
    (spec,) = find_tasks(["one"], folder)
    files = spec.digest_parts["configs"]["one"]["dataset_kwargs"]["data_files"]
    assert len(files["test"]) == 2


def test_names_that_do_not_exist(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"task folder .*absent does not exist"):
        find_tasks(["one"], folder / "absent")
    (folder / "torn.yaml").write_text("task: [torn\n")
    with pytest.raises(ConfigError) as caught:
        find_tasks(["one", "litle"], folder)
    message = str(caught.value)
    assert "no lm-eval task is called 'litle'; nearest: little" in message
    assert "torn.yaml cannot be read" in message and "\n" not in message
    with pytest.raises(ConfigError, match="'arc_eazy'; nearest: arc_easy"):
        find_tasks(["arc_eazy"])
    # The folder holds no arc_easy: lm-eval's own is taken, without its data being fetched.
    (spec,) = find_tasks(["arc_easy"], folder)
    assert spec.digest_parts["configs"]["arc_easy"]["dataset_path"] == "allenai/ai2_arc"


OFFLINE = """
    import json, socket, sys
    from pathlib import Path

    def refuse(self, address):
        raise OSError(f"the network is cut: {address}")

    socket.socket.connect = socket.socket.connect_ex = refuse
    from transformers import LlamaForCausalLM
    from compress_core.hf.lm_eval_tasks import find_tasks, run_tasks
    from compress_core.hf.text import load_tokenizer

    folder, model = map(Path, sys.argv[1:])
    found = run_tasks(
        LlamaForCausalLM.from_pretrained(model), load_tokenizer(model), find_tasks(["one"], folder)
    )
    print(json.dumps(found))
"""


def test_it_works_with_the_network_cut(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = _model(0)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    cut = shutil.which("unshare")
    alone = [cut, "-rn"] if cut and subprocess.run([cut, "-rn", "true"]).returncode == 0 else []
    script = [sys.executable, "-c", textwrap.dedent(OFFLINE), str(folder), str(tmp_path / "model")]
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(root)}
    done = subprocess.run(
        alone + script,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    expected = _accuracy(model, tokenizer, folder / "data" / "one.jsonl")
    # Nothing but our own line on stdout.
    assert json.loads(done.stdout)["one"]["acc"] == pytest.approx(expected)


def test_the_local_tasks_of_a_real_model(shared: Path) -> None:
    from compress_core.hf.text import load_tokenizer

    folder = shared / "models" / "babyllama-1m"
    specs = find_tasks(["local_arc_easy", "local_lambada_openai"], shared / "data" / "lm_eval")
    model = LlamaForCausalLM.from_pretrained(folder)
    found = run_tasks(model, load_tokenizer(folder), specs, limit=8)
    assert set(found) == {"local_arc_easy", "local_lambada_openai"}
    assert set(found["local_arc_easy"]) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    assert 0 <= found["local_arc_easy"]["acc"] <= 1
    assert found["local_lambada_openai"]["perplexity"] > 1
