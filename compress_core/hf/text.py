"""From documents to token windows, and the tokenizer of a model folder.

Calibration windows are sampled as the papers do, evaluation windows come in order. Everything that
decides a window is an argument.
"""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress_core.errors import ModelError, TextError
from compress_core.hf.companions import tokenizer_files
from compress_core.hf.documents import read_documents as read_documents
from compress_core.hf.inside import read_json
from compress_core.hf.refusing import refusing

CHARACTERS_PER_TOKEN = 10
"""Characters sliced for every wanted token: 20 480 for 2048, as SVD-LLM's sampling does."""

_JOIN = "\n\n"
# What tokenizer_files finds beside a vocabulary, or without one.
_NO_VOCABULARY = (
    *("config.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
    *("added_tokens.json", "chat_template.json"),
)
_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")


def sample_windows(
    documents: Sequence[str],
    tokenizer: Any,
    *,
    samples: int,
    length: int,
    seed: int,
    bos: bool = False,
) -> Tensor:
    """Calibration windows at random places of the joined documents, as SVD-LLM samples them.

    A random character offset is drawn, `CHARACTERS_PER_TOKEN * length` characters are tokenised
    without special tokens, and the first `length` tokens are kept.

    Args:
        documents: Joined by blank lines.
        tokenizer: A transformers tokenizer.
        samples: Windows to draw; they may overlap.
        length: Tokens in each window.
        seed: Decides the offsets.
        bos: Put the tokenizer's beginning-of-text token first; the window length stays.

    Returns:
        int64 token ids (samples, length).

    Raises:
        TextError: Fewer tokens than one window, or `bos` without such a token.
    """
    _check_counts(samples=samples, length=length)
    first = []
    if bos:
        if tokenizer.bos_token_id is None:
            raise TextError("the tokenizer has no beginning-of-text token; sample without it")
        first = [tokenizer.bos_token_id]
    text = _JOIN.join(documents)
    wanted = length - len(first)
    last = len(text) - _tail_characters(text, tokenizer, wanted)
    generator = random.Random(seed)
    rows = []
    for _ in range(samples):
        tokens = _tokens_from(text, generator.randint(0, last), tokenizer, wanted)
        # A slice may merge into fewer tokens than the tail behind it; the tail itself has enough.
        rows.append(first + (tokens or _tokens_from(text, last, tokenizer, wanted)))
    return torch.tensor(rows, dtype=torch.long)


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise TextError(f"{name} is {count}; it must be at least 1")


def _encode(text: str, tokenizer: Any) -> list[int]:
    with refusing(TextError, "the tokenizer cannot encode it"):
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def first_refused(documents: Sequence[str], tokenizer: Any) -> int | None:
    """Index of the first document that the tokenizer cannot encode; None where it can each."""
    for index, document in enumerate(documents):
        try:
            _encode(document, tokenizer)
        except TextError:
            return index
    return None


def check_vocabulary(tokens: Tensor, tokenizer: Any, config: Any) -> None:
    """Refuses tokens that the model has no embedding for.

    Args:
        tokens: int64 token ids.
        tokenizer: What made them.
        config: The model's configuration.

    Raises:
        ModelError: One lies beyond the vocabulary that the configuration states.
    """
    rows = getattr(text_config(config), "vocab_size", None)
    largest = int(tokens.max())
    if isinstance(rows, int) and largest >= rows:
        with refusing(ModelError, f"token {largest} cannot be named"):
            token = tokenizer.convert_ids_to_tokens(largest)
        raise ModelError(
            f"the tokenizer gives token {largest} ({token!r}) and the model's embedding ends at "
            f"{rows - 1}: the tokenizer belongs to another model; put the right one in its folder"
        )


def _tail_characters(text: str, tokenizer: Any, wanted: int) -> int:
    """Characters of a short end of the text that still gives `wanted` tokens."""
    count = wanted
    while True:
        count = min(count, len(text))
        tokens = len(_encode(text[len(text) - count :], tokenizer))
        if tokens >= wanted:
            return count
        if count == len(text):
            raise TextError(
                f"the text has {tokens} tokens and one window needs {wanted}; "
                "give more text or a shorter length"
            )
        count += max(wanted // 2, 1)


def _tokens_from(text: str, start: int, tokenizer: Any, wanted: int) -> list[int]:
    """The first `wanted` tokens at a character offset, or [] if the rest of the text has fewer."""
    count = CHARACTERS_PER_TOKEN * wanted
    while True:
        tokens = _encode(text[start : start + count], tokenizer)
        if len(tokens) >= wanted:
            return tokens[:wanted]
        if start + count >= len(text):
            return []
        count *= 2


def evaluation_windows(
    documents: Sequence[str], tokenizer: Any, *, length: int, windows: int | None = None
) -> Tensor:
    """Consecutive windows of the joined documents from their beginning, the remainder dropped.

    The text is tokenised once, without special tokens; with `windows` given, only a prefix of it
    that ends at a line and reaches well past the last window.

    Args:
        documents: Joined by blank lines.
        tokenizer: A transformers tokenizer.
        length: Tokens in each window.
        windows: At most so many; None or 0 for all.

    Returns:
        int64 token ids (n, length), n >= 1.

    Raises:
        TextError: Fewer tokens than one window.
    """
    _check_counts(length=length)
    text = _JOIN.join(documents)
    tokens = _prefix_tokens(text, tokenizer, length * windows if windows else None)
    count = len(tokens) // length
    if not count:
        raise TextError(
            f"the text has {len(tokens)} tokens and one window needs {length}; "
            "give more text or a shorter length"
        )
    count = min(count, windows) if windows else count
    return torch.tensor(tokens[: count * length], dtype=torch.long).view(count, length)


def _prefix_tokens(text: str, tokenizer: Any, wanted: int | None) -> list[int]:
    """All tokens of a text, or at least the first `wanted`, equal to those of the whole text."""
    if wanted is None:
        return _encode(text, tokenizer)
    # What follows a cut can change only the tokens next to it: a margin keeps those out of reach.
    margin = wanted + 256
    count = 5 * margin
    while count < len(text):
        cut = max(text.rfind("\n", 0, count), text.rfind(" ", 0, count)) + 1 or count
        tokens = _encode(text[:cut], tokenizer)
        if len(tokens) >= margin:
            return tokens
        count = math.ceil(count * max(1.2, 1.1 * margin / max(len(tokens), 1)))
    return _encode(text, tokenizer)


def split_held_out(documents: Sequence[str], share: float = 0.1) -> tuple[list[str], list[str]]:
    """Holds the last `share` of the text back, for evaluation where the user gave no text for it.

    The cut is at the document boundary nearest to the share, or, where that is more than half
    the share away, at a line inside the document that spans it.

    Returns:
        The documents before the cut and those after it, neither without text.

    Raises:
        TextError: Too little text to cut.
    """
    total = sum(map(len, documents))
    target = total - round(share * total)
    starts = [0]
    for document in documents:
        starts.append(starts[-1] + len(document))
    near = min(range(1, len(starts)), key=lambda i: abs(starts[i] - target), default=0)
    if near < len(documents) and abs(starts[near] - target) <= share * total / 2:
        before, after = list(documents[:near]), list(documents[near:])
    else:
        index = max((i for i in range(len(documents)) if starts[i] < target), default=0)
        document = documents[index] if documents else ""
        place = target - starts[index]
        cut = document.rfind("\n", 1, place) + 1 or document.rfind(" ", 1, place) + 1 or place
        before = [*documents[:index], document[:cut]]
        after = [document[cut:], *documents[index + 1 :]]
    if not "".join(before).strip() or not "".join(after).strip():
        raise TextError(f"{total} characters are too few to hold a part back; give another text")
    return before, after


def load_tokenizer(folder: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a local model folder, never from the network.

    Raises:
        ModelError: The folder has none that transformers can load.
    """
    from transformers import AutoTokenizer

    folder = Path(folder)
    try:
        with refusing(ModelError, f"no tokenizer can be loaded from {folder}"):
            return AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=trust_remote_code
            )
    except ModelError as error:
        for file in sorted(folder.glob("*token*.json")):  # transformers names none
            read_json(file)
        if not any(file.name not in _NO_VOCABULARY for file in tokenizer_files(folder)):
            raise ModelError(
                f"no tokenizer can be loaded from {folder}: it has none; put its files there "
                "(tokenizer.json, or a vocabulary of an older kind)"
            ) from None
        raise error


def clip_length(length: int, config: Any) -> int:
    """A window length cut to the model's context, where its configuration states one."""
    contexts = (getattr(text_config(config), name, None) for name in _CONTEXT_NAMES)
    stated = [context for context in contexts if isinstance(context, int) and context > 0]
    return min([length, *stated[:1]])


def text_config(config: Any) -> Any:
    """The part of a configuration that is about text; all of it where it has no parts."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config
