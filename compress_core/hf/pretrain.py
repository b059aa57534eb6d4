"""Trains a small real Llama from scratch on a text, for demonstrations where no model is at hand.

A byte-level tokenizer, then a fixed number of steps: the same bytes for the same settings.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress_core.errors import ConfigError, NumericsError, TextError

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class PretrainSettings:
    """Everything that decides the trained model, beside the text.

    By default 0.26M parameters see 0.7M tokens, in about 40 seconds of one core. A model so small
    for its text has no room to spare, so that compression hurts it and methods differ.

    Attributes:
        max_characters: Text to gather for the three parts (see `gather_python_text`).
        seed: Of the text's parts, the initial weights and the order of the windows.
        vocabulary: Entries of the tokenizer.
        width: Hidden size.
        layers: Decoder blocks.
        heads: Query heads.
        key_value_heads: Key and value heads, fewer than `heads` for grouped-query attention.
        feed_forward: Inner size of the feed-forward part.
        context: Tokens in a training window, and the longest the model takes.
        steps: Optimiser steps.
        batch: Windows in a step.
        learning_rate: Its highest value, after the warm-up.
        warmup: Share of the steps in which the learning rate rises.
        weight_decay: On matrices, not on norms.
        initial_scale: Standard deviation of the initial weights.
    """

    max_characters: int = 2_000_000
    seed: int = 0
    vocabulary: int = 1024
    width: int = 64
    layers: int = 4
    heads: int = 4
    key_value_heads: int = 2
    feed_forward: int = 192
    context: int = 128
    steps: int = 700
    batch: int = 8
    learning_rate: float = 8e-3
    warmup: float = 0.05
    weight_decay: float = 0.0
    initial_scale: float = 0.05


def pretrain(
    texts: Sequence[str],
    folder: Path,
    settings: PretrainSettings,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Trains tokenizer and model and saves both into a folder that transformers loads.

    Same text, settings and machine give the same bytes, whatever the number of threads.

    Args:
        texts: Training documents.
        folder: Created where needed.
        settings: What to train.
        progress: Called after each step with steps done and steps in all.

    Returns:
        The training loss of each step, nats per token.

    Raises:
        ConfigError: Sizes that do not fit together.
        TextError: Fewer tokens than one batch.
        NumericsError: A loss that is not finite; names the step.
    """
    _check(settings)
    tokenizer = train_tokenizer(texts, settings)
    windows = _windows(texts, tokenizer, settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = _new_model(tokenizer, settings)
        with _one_thread():
            losses = _train(model, windows, settings, progress)
    folder.mkdir(parents=True, exist_ok=True)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return losses


@contextmanager
def _one_thread() -> Iterator[None]:
    """So small a model gains little from a second thread, and loses much where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _check(settings: PretrainSettings) -> None:
    if settings.width % settings.heads or settings.heads % settings.key_value_heads:
        raise ConfigError(
            f"width {settings.width}, heads {settings.heads} and key_value_heads "
            f"{settings.key_value_heads}: each must be a multiple of the next"
        )
    if settings.steps < 1 or settings.batch < 1:
        raise ConfigError(f"steps {settings.steps}, batch {settings.batch}: both must be positive")


def train_tokenizer(texts: Sequence[str], settings: PretrainSettings) -> Any:
    """A byte-level BPE tokenizer: any text has tokens, and decoding gives it back."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=settings.context,
    )


def _windows(texts: Sequence[str], tokenizer: Any, settings: PretrainSettings) -> Tensor:
    """All documents' tokens, each with its end token, cut into windows (n, context)."""
    rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    tokens = [token for row in rows for token in (*row, tokenizer.eos_token_id)]
    count = len(tokens) // settings.context
    if count < settings.batch:
        raise TextError(
            f"the training text has {len(tokens)} tokens and one batch needs "
            f"{settings.batch * settings.context}; give more text"
        )
    return torch.tensor(tokens[: count * settings.context]).view(count, settings.context)


def _new_model(tokenizer: Any, settings: PretrainSettings) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.width,
        intermediate_size=settings.feed_forward,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.key_value_heads,
        max_position_embeddings=settings.context,
        initializer_range=settings.initial_scale,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def _train(
    model: Any,
    windows: Tensor,
    settings: PretrainSettings,
    progress: Callable[[int, int], None] | None,
) -> list[float]:
    optimizer = _optimizer(model, settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: _rate(s, settings))
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.empty(0, dtype=torch.long)
    losses = []
    model.train()
    for step in range(settings.steps):
        if len(order) < settings.batch:
            order = torch.randperm(len(windows), generator=generator)
        chosen, order = order[: settings.batch], order[settings.batch :]
        batch = windows[chosen]
        loss = model(input_ids=batch, labels=batch).loss
        if not torch.isfinite(loss):
            raise NumericsError(f"pretrain: the loss is {float(loss.detach())} at step {step}")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if progress:
            progress(step + 1, settings.steps)
    return losses


def _optimizer(model: nn.Module, settings: PretrainSettings) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=True)


def _rate(step: int, settings: PretrainSettings) -> float:
    """Linear warm-up, then half a cosine down to a twentieth of the highest rate."""
    warm = max(1, round(settings.warmup * settings.steps))
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, settings.steps - warm)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))
