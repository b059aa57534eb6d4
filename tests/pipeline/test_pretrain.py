"""The demonstration's model: its text never mixes, and its training learns and repeats itself."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compress_core.errors import ConfigError, NumericsError, TextError
from compress_core.hf import pretrain as module
from compress_core.hf import python_docs
from compress_core.hf.pretrain import PretrainSettings, pretrain
from compress_core.hf.python_docs import LONGEST_DOCUMENT, gather_python_text
from compress_core.hf.text import evaluation_windows, load_tokenizer
from compress_core.hf.writing import write_on
from tests.pipeline import pico
from tests.pipeline.forking import run_script
from tests.whole import perplexity_and_kl

MICRO = PretrainSettings(
    max_characters=200_000,
    vocabulary=400,
    width=32,
    layers=2,
    heads=4,
    key_value_heads=2,
    feed_forward=64,
    context=32,
    steps=150,
    batch=8,
    learning_rate=1e-2,
    initial_scale=0.05,
)


def test_the_parts_are_disjoint_and_the_seed_decides_them() -> None:
    training, calibration, evaluation = gather_python_text(400_000, 0)
    parts = [set(training), set(calibration), set(evaluation)]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    sizes = [sum(map(len, part)) for part in (training, calibration, evaluation)]
    assert 380_000 <= sum(sizes) <= 400_000
    assert all(40_000 <= size <= 40_000 + LONGEST_DOCUMENT for size in sizes[1:])
    assert max(map(len, training)) <= LONGEST_DOCUMENT
    assert gather_python_text(400_000, 0) == (training, calibration, evaluation)
    assert gather_python_text(400_000, 1) != (training, calibration, evaluation)


def test_sources_and_prose_are_there_and_tests_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b.py", "a.py", "inner/c.py", "test/d.py", "site-packages/e.py", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n" * 50)
    monkeypatch.setattr(python_docs.os, "__file__", str(tmp_path / "os.py"))
    monkeypatch.setattr(python_docs, "_topics", lambda: ["prose " * 20])
    training, calibration, evaluation = gather_python_text(1_600, 0)
    found = {text.split("\n")[0] for text in training + calibration + evaluation}
    assert found == {"prose " * 20, "# a.py", "# b.py", "# inner/c.py"}


def test_a_python_without_sources_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(python_docs.os, "__file__", str(tmp_path / "os.py"))
    monkeypatch.setattr(python_docs, "_topics", lambda: [])
    with pytest.raises(TextError, match="0 of 1000 characters"):
        gather_python_text(1000, 0)


@pytest.fixture(scope="module")
def texts() -> tuple[list[str], list[str], list[str]]:
    return gather_python_text(MICRO.max_characters, MICRO.seed)


@pytest.fixture(scope="module")
def trained(texts, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    folder = tmp_path_factory.mktemp("demo") / "model"
    return folder, pretrain(texts[0], folder, MICRO)


def test_it_learns_more_than_how_often_each_token_comes(texts, trained) -> None:
    folder, losses = trained
    assert len(losses) == MICRO.steps
    assert losses[0] == pytest.approx(math.log(MICRO.vocabulary), abs=0.5)
    tokenizer = load_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    windows = evaluation_windows(texts[2], tokenizer, length=MICRO.context, windows=100)
    found = perplexity_and_kl(model, windows)
    counts = Counter(token for text in texts[0] for token in tokenizer(text)["input_ids"])
    total = counts.total() + len(tokenizer)
    targets = windows[:, 1:].flatten().tolist()
    unigram = -sum(math.log((counts[token] + 1) / total) for token in targets) / len(targets)
    assert found.perplexity < 0.6 * math.exp(unigram)


def test_the_folder_is_an_ordinary_llama(trained) -> None:
    folder, _ = trained
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.tie_word_embeddings
    assert model.config.num_key_value_heads == MICRO.key_value_heads
    assert model.config.max_position_embeddings == MICRO.context
    assert (folder / "model.safetensors").is_file()
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer) == model.config.vocab_size == MICRO.vocabulary
    text = "def é(x):\n\treturn '日本'  # ∑\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    prompt = tokenizer("import ", return_tensors="pt", return_token_type_ids=False)
    assert model.generate(**prompt, max_new_tokens=4, do_sample=False).shape[1] > 4


def test_it_writes_the_likeliest_token_each_time(trained) -> None:
    folder, _ = trained
    tokenizer, model = load_tokenizer(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("import ", add_special_tokens=False)["input_ids"]
    written: list[int] = []
    for _ in range(5):
        logits = model(input_ids=torch.tensor([ids + written])).logits
        written.append(int(logits[0, -1].argmax()))
    assert tokenizer.eos_token_id not in written
    assert write_on(folder, "import ", 5) == tokenizer.decode(written)


AGAIN = """
import sys
from pathlib import Path
from typing import Any
from compress_core.hf.pretrain import pretrain
from compress_core.hf.python_docs import gather_python_text
from tests.pipeline.test_pretrain import MICRO
pretrain(gather_python_text(MICRO.max_characters, MICRO.seed)[0], Path(sys.argv[1]), MICRO)
"""


def test_another_process_writes_the_same_bytes(trained, tmp_path: Path) -> None:
    run_script(AGAIN, tmp_path / "again", folder=tmp_path, path=[pico.ROOT])
    for path in sorted(trained[0].iterdir()):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_surroundings_are_left_alone(texts, tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    told: list[tuple[int, int]] = []
    few = replace(MICRO, steps=2)
    pretrain(texts[0], tmp_path / "a", few, lambda done, total: told.append((done, total)))
    assert torch.equal(torch.rand(3), expected)
    assert told == [(1, 2), (2, 2)]
    other = pretrain(texts[0], tmp_path / "b", replace(few, seed=1))
    assert other != pretrain(texts[0], tmp_path / "c", few)


def test_a_loss_that_is_not_finite_names_its_step(
    texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = module._new_model

    def broken(*arguments):
        model = make(*arguments)
        with torch.no_grad():
            model.model.norm.weight.fill_(float("nan"))
        return model

    monkeypatch.setattr(module, "_new_model", broken)
    with pytest.raises(NumericsError, match="the loss is nan at step 0"):
        pretrain(texts[0], tmp_path / "model", MICRO)
    assert not (tmp_path / "model").exists()


def test_settings_that_do_not_fit_are_refused(texts, tmp_path: Path) -> None:
    for wrong in ({"width": 33}, {"heads": 3, "width": 33}, {"steps": 0}, {"batch": 0}):
        with pytest.raises(ConfigError):
            pretrain(texts[0], tmp_path, replace(MICRO, **wrong))
    with pytest.raises(TextError, match="one batch needs 256"):
        pretrain(["too short"], tmp_path, MICRO)
