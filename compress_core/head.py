"""A causal language model in two halves, so that its logits are never held whole.

Logits are the largest tensor of a forward pass by far (vocabulary against width), and whoever needs
them needs one row at a time. So the last hidden states are held, and the head runs on pieces of
them: the model's own forward with its base model replaced by one that hands the piece back, so that
biases, scales, soft caps and casts are what the model's class makes of them.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from compress_core.errors import ModelError

PIECE_ELEMENTS = 1 << 24
"""Logits of one piece (64 MiB in float32); bounds memory, not results."""
ROW_STEP = 16
"""Rows of a piece are a multiple of it where they can be: products of whole tiles are faster."""

CHUNK_ELEMENTS = {"cpu": 1 << 17, "other": 1 << 22}
"""Logits whose softmax is taken at a time: as many as the caches of a core hold, in float64, by
each thread; or enough for an accelerator."""

Measure = Callable[[Tensor, slice], Tensor]  # logits (rows, vocabulary), which rows they are


def chunks(rows: Tensor) -> list[slice]:
    """Rows (rows, vocabulary) in parts, CHUNK_ELEMENTS or one row for each thread."""
    elements = CHUNK_ELEMENTS["other"]
    if rows.device.type == "cpu":
        elements = CHUNK_ELEMENTS["cpu"] * torch.get_num_threads()
    step = max(1, elements // rows.shape[-1])
    return [slice(begin, begin + step) for begin in range(0, len(rows), step)]


@contextmanager
def forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Gives a module another forward; a class's own comes back by taking ours away."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


class Halves:
    """The base model of a causal language model, and what its class does behind it.

    Args:
        model: A causal language model of HuggingFace's make: `base_model` gives an output with
            `last_hidden_state`, and the model's own forward makes `logits` of that, row by row.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        # A class may call the decoder inside its base model, past the base model itself (OPT).
        inner = (model.base_model, getattr(model.base_model, "decoder", None))
        self._bodies = [part for part in inner if isinstance(part, nn.Module)]
        self._output: Any = None

    def hidden(self, ids: Tensor) -> Tensor:
        """The last hidden states (batch, length, width) of windows (batch, length)."""
        return self.last(self.model.base_model(input_ids=ids, use_cache=False))

    def last(self, output: Any) -> Tensor:
        """The last hidden states in what the base model returned; :meth:`logits` needs its kind."""
        self._output = type(output)
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _of_model(self, ids: Tensor) -> Tensor:
        try:
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise ModelError(
                f"{type(self.model).__name__} makes its logits of more than its base model's last "
                "hidden states, so it cannot be evaluated piece by piece"
            ) from error
        return logits

    def logits(self, rows: Tensor) -> Tensor:
        """The model's logits (rows, vocabulary) of rows (rows, width) that :meth:`hidden` gave.

        Raises:
            ModelError: The model's class does not make its logits of its base model's output.
        """
        asked = []

        def body(*_: Any, **__: Any) -> Any:
            asked.append(True)
            return self._output(last_hidden_state=rows[None])

        ids = torch.zeros(1, len(rows), dtype=torch.long, device=rows.device)
        with ExitStack() as stack:
            for part in self._bodies:
                stack.enter_context(forward_of(part, body))
            logits = self._of_model(ids)
        if len(asked) != 1 or logits.shape[:2] != ids.shape:
            raise ModelError(
                f"{type(self.model).__name__} does not make its logits of its base model's last "
                "hidden states row by row, so they cannot be made in pieces"
            )
        return logits[0]

    def pieces(self, rows: int) -> list[slice]:
        """So many rows in parts whose logits are of PIECE_ELEMENTS at most, or one row each."""
        most = max(1, PIECE_ELEMENTS // self.model.config.get_text_config().vocab_size)
        most = most // ROW_STEP * ROW_STEP or most
        return [slice(begin, min(begin + most, rows)) for begin in range(0, rows, most)]

    def total(self, rows: Tensor, measure: Measure) -> Tensor:
        """A sum over rows, piece by piece, differentiable.

        With gradients a piece's logits are computed again in the backward pass, so that there too
        no more than one piece of them exists. The gradients reach the rows and the head's weights.

        Args:
            rows: (rows, width) that :meth:`hidden` gave.
            measure: The sum over one piece, of any shape; it holds nothing of the logits.
        """
        pieces = self.pieces(len(rows))
        again = len(pieces) > 1 and torch.is_grad_enabled()

        def of(piece: Tensor, where: slice) -> Tensor:
            return measure(self.logits(piece), where)

        sums = [
            checkpoint(of, rows[p], p, use_reentrant=False, preserve_rng_state=False)
            if again
            else of(rows[p], p)
            for p in pieces
        ]
        total: Tensor = torch.stack(sums).sum(0)
        return total
