"""A model as lm-eval takes it, with what its tokenizer lacks."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from torch import nn

from compress_core.errors import ModelError
from compress_core.hf.text import text_config

_LACKS = (
    "the tokenizer has no token to {} a text with, which this task needs; name one (bos_token or "
    "eos_token) in tokenizer_config.json"
)


def make_evaluator(model: nn.Module, tokenizer: Any, **settings: Any) -> Any:
    """lm-eval's model of a transformers model.

    Where the tokenizer names no token that texts begin or end with, those of the model's
    configuration do; where there are none either, only a task that needs one is refused.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer; a copy is used.
        **settings: Passed to `HFLM`.
    """
    from lm_eval.models.huggingface import HFLM

    class Evaluator(HFLM):
        @property
        def prefix_token_id(self) -> int:
            found = super().prefix_token_id
            if found is None:
                raise ModelError(_LACKS.format("begin"))
            return int(found)

        @property
        def eot_token_id(self) -> int:
            if self.tokenizer.eos_token_id is None:
                raise ModelError(_LACKS.format("end"))
            return int(self.tokenizer.eos_token_id)

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, *args: Any, **more: Any
        ) -> list[int]:
            # It would ask for the prefix token, to see whether the text begins with it.
            if add_special_tokens is None and _begins(self.tokenizer) is None:
                add_special_tokens = False
            found: list[int] = super().tok_encode(string, add_special_tokens, *args, **more)
            return found

    own = copy.deepcopy(tokenizer)
    config = text_config(model.config)
    for name in ("bos_token", "eos_token"):
        index = getattr(config, f"{name}_id", None)
        if getattr(own, name, None) is None and isinstance(index, int) and 0 <= index < len(own):
            setattr(own, name, own.convert_ids_to_tokens(index))
    return Evaluator(pretrained=model, tokenizer=own, **settings)


def _begins(tokenizer: Any) -> int | None:
    return next(
        (i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), None
    )


@contextlib.contextmanager
def known_tokens(evaluator: Any) -> Iterator[None]:
    """Refuses tokens that the model has no embedding for, before it looks them up.

    Raises:
        ModelError: There is one.
    """
    model, tokenizer = evaluator.model, evaluator.tokenizer
    rows = model.get_input_embeddings().weight.shape[0]

    def check(_module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        tokens = named["input_ids"] if "input_ids" in named else arguments[0]
        padding = tokenizer.pad_token_id
        if padding is not None and padding >= rows:  # lm-eval's own; what stands there is not read
            tokens = tokens.masked_fill(tokens == padding, 0)
        largest = int(tokens.max())
        if largest >= rows:
            raise ModelError(
                f"the tokenizer gives token {largest} and the model's embedding ends at "
                f"{rows - 1}: the tokenizer belongs to another model"
            )
        if "input_ids" in named:
            return arguments, {**named, "input_ids": tokens}
        return (tokens, *arguments[1:]), named

    handle = model.register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
