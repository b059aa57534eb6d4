"""What a completion or chat request may say, and the one line that refuses what it may not.

With pyfunc_model.py this is written into model folders, and needs nothing of ours there.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from mlflow.exceptions import MlflowException

# Everything of a request that is read; MLflow drops other fields, and says so in its log. Those of
# PARAMETERS may also be MLflow's `params`, by type.
FIELDS = (
    *("prompt", "messages", "model", "max_tokens", "max_new_tokens", "max_completion_tokens"),
    *("temperature", "top_p", "stop", "seed", "n", "stream"),
)
PARAMETERS = {
    **dict.fromkeys(("max_tokens", "max_new_tokens", "max_completion_tokens", "seed"), "long"),
    **dict.fromkeys(("temperature", "top_p"), "double"),
}


@dataclass(frozen=True)
class Request:
    """One request that was read and found right.

    Attributes:
        prompts: Token ids of each, (1, tokens).
        chat: Whether they were messages.
        max_tokens: How many are written at most, for each prompt.
        temperature: 0 is the likeliest token each time.
        top_p: Share of the probability that is drawn from, above 0 and at most 1.
        stop: Texts that end an answer and are no part of it.
        seed: Of the draws; None is another answer each time.
        model: What the answer calls the model.
    """

    prompts: list[torch.Tensor]
    chat: bool
    max_tokens: int
    temperature: float
    top_p: float
    stop: tuple[str, ...]
    seed: int | None
    model: str


def read_turn(message: Any) -> dict[str, Any]:
    """A message with its text in one piece."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise wrong(f"each of messages has a role and content, got {message!r}")
    content: Any = message.get("content")
    if is_list(content):
        texts = [part.get("text") if isinstance(part, dict) else None for part in content]
        content = None if None in texts else "".join(map(str, texts))
    if not isinstance(content, str):
        raise wrong(f"the content of each of messages is text, got {message.get('content')!r}")
    return {**message, "content": content}


def read_texts(value: Any, name: str) -> tuple[str, ...]:
    """A text, or each of a list of texts."""
    found = (value,) if isinstance(value, str) else tuple(value) if is_list(value) else (None,)
    if not all(isinstance(text, str) and text for text in found):
        raise wrong(f"{name} is a text that is not empty, or a list of such texts")
    return found


def read_number(
    row: dict[str, Any],
    name: str,
    default: float,
    *,
    least: float,
    most: float = math.inf,
    whole: bool = False,
) -> float:
    """A number of a request, within its range; pandas makes whole ones fractions."""
    value = row.get(name, default)
    try:
        right = not isinstance(value, str | bool) and (
            name not in row or least <= float(value) <= most
        )
        right = right and (not whole or float(value) == int(value))
    except (TypeError, ValueError, OverflowError):
        right = False
    if not right:
        kind = "a whole number" if whole else "a number"
        limits = f"{least:g} or more" if math.isinf(most) else f"from {least:g} to {most:g}"
        raise wrong(f"{name} is {kind}, {limits}, got {value!r}")
    return int(value) if whole else float(value)


def is_list(value: Any) -> bool:
    """Whether a field is a list; in tables MLflow makes arrays of them."""
    return isinstance(value, list | tuple) or type(value).__name__ == "ndarray"


def is_given(value: Any) -> bool:
    """Whether a field was sent: tables have NaN where a row lacks what another one has."""
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def wrong(message: str) -> MlflowException:
    """The refusal of a request: MLflow's server answers it with status 400."""
    return MlflowException.invalid_parameter_value(message)
