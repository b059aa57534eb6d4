"""Laws of perplexity and divergence: known values, exact zeros, nothing hidden when it breaks."""

import math
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from compress_core import head
from compress_core.errors import NumericsError, TextError
from tests.whole import perplexity_and_kl

VOCABULARY = 37


class Table(nn.Module):
    """Next-token logits looked up by the token, or the same for all: every value is known."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.base_model = _LookUp(logits)
        self.config = LlamaConfig(vocab_size=logits.shape[-1])

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache and not self.training and torch.is_inference_mode_enabled()
        return SimpleNamespace(logits=self.base_model(input_ids).last_hidden_state)


class _LookUp(nn.Module):
    """The hidden states of a table are the logits."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.logits[input_ids])


def _llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
            initializer_range=0.5,
        )
    )


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(VOCABULARY, (7, 12), generator=torch.Generator().manual_seed(0))


def test_a_uniform_model_has_the_vocabulary_as_perplexity(windows: Tensor) -> None:
    found = perplexity_and_kl(Table(torch.full((VOCABULARY, VOCABULARY), 3.0)), windows)
    assert found.perplexity == pytest.approx(VOCABULARY, rel=1e-12)
    assert found.nll == pytest.approx(math.log(VOCABULARY), rel=1e-12)
    assert (found.kl, found.windows, found.length, found.tokens) == (None, 7, 12, 7 * 11)


def test_a_model_that_knows_the_next_token_has_perplexity_one() -> None:
    cycle = torch.arange(24).remainder(VOCABULARY).expand(3, 24)
    sure = 200.0 * torch.eye(VOCABULARY).roll(1, dims=1)
    assert perplexity_and_kl(Table(sure), cycle).perplexity == pytest.approx(1.0, abs=1e-12)


def test_divergence_is_the_textbook_sum(windows: Tensor) -> None:
    generator = torch.Generator().manual_seed(1)
    ours, dense = torch.randn(2, VOCABULARY, VOCABULARY, generator=generator).double().unbind()
    found = perplexity_and_kl(Table(ours), windows, reference=Table(dense))
    p, q = dense.softmax(-1), ours.softmax(-1)
    by_token = (p * (p / q).log()).sum(-1)
    assert found.kl == pytest.approx(float(by_token[windows[:, :-1]].mean()), rel=1e-10)
    surprise = -q.log()[windows[:, :-1], windows[:, 1:]].mean()
    assert found.nll == pytest.approx(float(surprise), rel=1e-10)


def test_divergence_from_itself_is_exactly_zero(windows: Tensor) -> None:
    model = _llama(0)
    assert perplexity_and_kl(model, windows, reference=model).kl == 0.0
    assert perplexity_and_kl(model, windows, reference=_llama(0)).kl == 0.0


@pytest.mark.parametrize("noise", [1e-6, 1e-3, 1.0, 100.0])
def test_divergence_is_never_negative(windows: Tensor, noise: float) -> None:
    generator = torch.Generator().manual_seed(2)
    dense = torch.randn(VOCABULARY, VOCABULARY, generator=generator)
    ours = dense + noise * torch.randn(VOCABULARY, VOCABULARY, generator=generator)
    kl = perplexity_and_kl(Table(ours), windows, reference=Table(dense)).kl
    # For a small change it is half the variance of the change: of the order of noise squared.
    assert kl is not None and kl > 0.01 * min(noise**2, 1.0)


def test_the_batch_size_changes_rounding_only(windows: Tensor) -> None:
    model, dense = _llama(1), _llama(2)
    one = perplexity_and_kl(model, windows, reference=dense, batch_size=1)
    for batch_size in (2, 3, 7, 50):
        many = perplexity_and_kl(model, windows, reference=dense, batch_size=batch_size)
        assert many.nll == pytest.approx(one.nll, rel=1e-6)
        assert many.kl == pytest.approx(one.kl, rel=1e-5)


def test_the_chunk_size_changes_rounding_only(
    windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, dense = _llama(1), _llama(2)
    whole = perplexity_and_kl(model, windows, reference=dense)
    for elements in (1, 2 * VOCABULARY, 5 * VOCABULARY + 1):
        monkeypatch.setitem(head.CHUNK_ELEMENTS, "cpu", elements)
        parts = perplexity_and_kl(model, windows, reference=dense)
        assert parts.nll == pytest.approx(whole.nll, rel=1e-12)
        assert parts.kl == pytest.approx(whole.kl, rel=1e-12)


def test_every_window_has_what_it_has_by_itself(windows: Tensor) -> None:
    model = _llama(1)
    for batch_size in (1, 3):
        found = perplexity_and_kl(model, windows, batch_size=batch_size)
        alone = [perplexity_and_kl(model, window[None]).nll for window in windows]
        assert found.by_window == pytest.approx(tuple(alone), rel=1e-6)
        assert fmean(found.by_window) == pytest.approx(found.nll, rel=1e-15)


def test_it_is_the_loss_that_transformers_reports(windows: Tensor) -> None:
    model = _llama(3).eval()
    for row in windows:
        window = row[None]
        with torch.no_grad():
            loss = float(model(input_ids=window, labels=window).loss)
        assert perplexity_and_kl(model, window).nll == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_logits_that_are_not_finite_name_their_window(bad: float, batch_size: int) -> None:
    windows = torch.zeros(6, 9, dtype=torch.long)
    windows[4, 5] = 1
    logits = torch.zeros(2, VOCABULARY)
    logits[1, 30] = bad
    sound, broken = Table(torch.zeros(2, VOCABULARY)), Table(logits)
    with pytest.raises(NumericsError, match=r"the model in window 4, position 5, are not finite"):
        perplexity_and_kl(broken, windows, reference=sound, batch_size=batch_size)
    with pytest.raises(NumericsError, match=r"the dense model in window 4, position 5"):
        perplexity_and_kl(sound, windows, reference=broken, batch_size=batch_size)


def test_a_perplexity_beyond_all_numbers_is_an_error_and_no_infinity() -> None:
    sure = 1000.0 * torch.eye(VOCABULARY)
    with pytest.raises(NumericsError, match=r"exp\(1000\)"):
        perplexity_and_kl(Table(sure), torch.tensor([[0, 1, 2]]))


def test_half_precision_logits_are_widened(windows: Tensor) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(VOCABULARY, VOCABULARY, generator=generator).bfloat16()
    half = perplexity_and_kl(Table(logits), windows, reference=Table(logits.double()))
    assert half.kl == 0.0
    assert half.nll == perplexity_and_kl(Table(logits.double()), windows).nll


@pytest.mark.parametrize("shape", [(0, 5), (3, 1), (4,)])
def test_windows_with_nothing_to_predict_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(TextError, match="windows have shape"):
        perplexity_and_kl(
            Table(torch.zeros(VOCABULARY, VOCABULARY)), torch.zeros(shape, dtype=torch.long)
        )


def test_progress_ends_at_the_number_of_windows(windows: Tensor) -> None:
    told: list[tuple[int, int]] = []
    table = Table(torch.zeros(VOCABULARY, VOCABULARY))
    perplexity_and_kl(
        table, windows, batch_size=3, progress=lambda done, total: told.append((done, total))
    )
    assert told == [(3, 7), (6, 7), (7, 7)]


@pytest.mark.parametrize(
    ("name", "source", "perplexity"),
    [
        ("stories260K", "tinystories/valid.txt", 6.90),
        ("babyllama-1m", "tinystories/valid.txt", 3.13),
        ("wiki-llama-5m", "wiki2015/test.jsonl", 56.8),
    ],
)
def test_real_models_have_their_known_perplexity(shared, name, source, perplexity) -> None:
    from compress_core.hf.text import evaluation_windows, load_tokenizer, read_documents

    folder = shared / "models" / name
    documents = read_documents(str(shared / "data" / source)).texts
    windows = evaluation_windows(documents, load_tokenizer(folder), length=256, windows=40)
    found = perplexity_and_kl(LlamaForCausalLM.from_pretrained(folder), windows)
    assert found.perplexity == pytest.approx(perplexity, rel=0.06)
