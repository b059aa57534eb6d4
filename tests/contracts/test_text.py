"""From documents to windows: what decides a window, and how little text is still enough."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from compress_core.errors import ModelError, TextError
from compress_core.hf import text
from compress_core.hf.companions import tokenizer_files
from compress_core.hf.text import (
    clip_length,
    evaluation_windows,
    load_tokenizer,
    read_documents,
    sample_windows,
    split_held_out,
)

STORIES = [
    f"Story {i}: there was a cat number {i * 7} who saw {i} birds.\nIt said: hello, bird {i}!\n"
    for i in range(300)
]


def _byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(STORIES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def _whole_text_bpe() -> PreTrainedTokenizerFast:
    """Merges across words, as Llama's: no pre-tokeniser, a space mark put in front of the text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>"], show_progress=False
    )
    tokenizer.train_from_iterator(STORIES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return _byte_level()


@pytest.fixture(scope="module")
def folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(path)
    return path


def test_sampling_is_decided_by_its_seed(tokenizer: PreTrainedTokenizerFast) -> None:
    def sample(seed: int) -> torch.Tensor:
        return sample_windows(STORIES, tokenizer, samples=20, length=32, seed=seed)

    first = sample(3)
    assert first.shape == (20, 32) and first.dtype == torch.long
    assert torch.equal(first, sample(3))
    assert not torch.equal(first, sample(4))
    assert len({tuple(row) for row in first.tolist()}) == 20


def test_windows_are_text_at_random_characters(tokenizer: PreTrainedTokenizerFast) -> None:
    joined = "\n\n".join(STORIES)
    starts = []
    for row in sample_windows(STORIES, tokenizer, samples=200, length=16, seed=0):
        starts.append(joined.find(str(tokenizer.decode(row))))
    assert min(starts) >= 0, "every window is a piece of the text"
    spread = sum(starts) / len(starts) / len(joined)
    assert abs(spread - 0.5) < 3 * math.sqrt(1 / 12 / len(starts)), "from all over it"


def test_bos_takes_the_first_place(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = sample_windows(STORIES, tokenizer, samples=4, length=16, seed=0, bos=True)
    assert rows.shape == (4, 16)
    assert (rows[:, 0] == tokenizer.bos_token_id).all()
    assert not (rows[:, 1:] == tokenizer.bos_token_id).any()
    with pytest.raises(TextError, match="no beginning-of-text token"):
        bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
        sample_windows(STORIES, bare, samples=1, length=4, seed=0, bos=True)


def test_a_slice_grows_for_a_tokenizer_with_long_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    words = PreTrainedTokenizerFast(tokenizer_object=_words())
    monkeypatch.setattr(text, "CHARACTERS_PER_TOKEN", 1)
    rows = sample_windows(STORIES, words, samples=8, length=50, seed=1)
    assert rows.shape == (8, 50)


def _words() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        STORIES, trainers.WordLevelTrainer(special_tokens=["<unk>"], show_progress=False)
    )
    return tokenizer


def test_text_of_exactly_one_window_is_enough(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenizer(STORIES[0])["input_ids"]
    rows = sample_windows(STORIES[:1], tokenizer, samples=3, length=len(tokens), seed=0)
    assert rows.tolist() == [tokens] * 3
    assert evaluation_windows(STORIES[:1], tokenizer, length=len(tokens)).tolist() == [tokens]
    need = f"{len(tokens)} tokens and one window needs {len(tokens) + 1}"
    with pytest.raises(TextError, match=need):
        sample_windows(STORIES[:1], tokenizer, samples=3, length=len(tokens) + 1, seed=0)
    with pytest.raises(TextError, match=need):
        evaluation_windows(STORIES[:1], tokenizer, length=len(tokens) + 1)


def test_short_text_still_gives_different_windows(tokenizer: PreTrainedTokenizerFast) -> None:
    # 200 tokens asked of a few hundred: ten characters a token would reach over the whole text.
    rows = sample_windows(STORIES[:20], tokenizer, samples=10, length=200, seed=0)
    assert len({tuple(row) for row in rows.tolist()}) == 10


@pytest.mark.parametrize("make", [_byte_level, _whole_text_bpe, lambda: _wrap(_words())])
@pytest.mark.parametrize("windows", [1, 7, 40])
def test_a_prefix_gives_the_same_windows_as_the_whole_text(make, windows: int) -> None:
    tokenizer = make()
    documents = STORIES * 4
    every = evaluation_windows(documents, tokenizer, length=32)
    whole = tokenizer("\n\n".join(documents), add_special_tokens=False)["input_ids"]
    assert every.flatten().tolist() == whole[: len(whole) // 32 * 32]
    first = evaluation_windows(documents, tokenizer, length=32, windows=windows)
    assert torch.equal(first, every[:windows])
    assert torch.equal(every, evaluation_windows(documents, tokenizer, length=32, windows=0))


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_few_windows_do_not_tokenise_all(tokenizer: PreTrainedTokenizerFast) -> None:
    seen = []

    def counting(text: str, **options: object) -> dict[str, list[int]]:
        seen.append(len(text))
        return tokenizer(text, **options)

    evaluation_windows(STORIES * 100, counting, length=32, windows=2)
    assert sum(seen) < len("\n\n".join(STORIES * 100)) / 100


def test_real_prefixes_agree(shared: Path) -> None:
    for name, source in [
        ("stories260K", "tinystories/valid.txt"),
        ("wiki-llama-5m", "wiki2015/valid.jsonl"),
    ]:
        tokenizer = load_tokenizer(shared / "models" / name)
        documents = read_documents(str(shared / "data" / source))
        every = evaluation_windows(documents, tokenizer, length=256)
        for windows in (1, 10, 50):
            first = evaluation_windows(documents, tokenizer, length=256, windows=windows)
            assert torch.equal(first, every[:windows])


@pytest.mark.parametrize("sizes", [[10] * 100, [1000], [900, 100], [500, 5, 495], [100, 900]])
def test_the_last_tenth_is_held_back(sizes: list[int]) -> None:
    line = "four\n"
    documents = [(line * size)[:size] for size in sizes]
    before, after = split_held_out(documents)
    assert "".join(before) + "".join(after) == "".join(documents)
    held = sum(map(len, after)) / sum(sizes)
    assert 0.05 <= held <= 0.15
    assert "".join(after).startswith("four"), "cut at a line, never inside one"


def test_a_whole_document_is_held_back_where_one_fits() -> None:
    assert split_held_out(["a" * 880, "b" * 120]) == (["a" * 880], ["b" * 120])
    with pytest.raises(TextError, match="too few to hold"):
        split_held_out(["a"])
    with pytest.raises(TextError, match="0 characters"):
        split_held_out([])


def test_the_tokenizer_of_a_folder(folder: Path, tmp_path: Path) -> None:
    loaded = load_tokenizer(folder)
    assert loaded("hello")["input_ids"] == _byte_level()("hello")["input_ids"]
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="no tokenizer can be loaded from"):
        load_tokenizer(tmp_path / "absent")


def test_files_that_decide_tokenisation(folder: Path, tmp_path: Path) -> None:
    names = [path.name for path in tokenizer_files(folder)]
    assert names == sorted(names)
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(names)
    for name in ("config.json", "model.safetensors", "tokenizer.model", "merges.txt", "README.md"):
        (tmp_path / name).write_text("{}")
    decided = {path.name for path in tokenizer_files(tmp_path)}
    # Without a class of its own the tokenizer is chosen by the model's type, in config.json.
    assert decided == {"config.json", "tokenizer.model", "merges.txt"}


def test_length_is_clipped_to_the_context() -> None:
    assert clip_length(2048, LlamaConfig(max_position_embeddings=256)) == 256
    assert clip_length(128, LlamaConfig(max_position_embeddings=256)) == 128
    assert clip_length(2048, GPT2Config(n_positions=512)) == 512
    assert clip_length(2048, SimpleNamespace(max_position_embeddings=None)) == 2048
    inner = LlamaConfig(max_position_embeddings=64)
    assert clip_length(2048, SimpleNamespace(get_text_config=lambda: inner)) == 64
