"""The dense model's predictions on the calibration windows, kept as the most likely tokens.

KL(dense || model) over the k tokens that the dense model finds most likely and one token that
stands for all others. That is never more than the whole divergence, and the same when k is the
vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress_core.errors import NumericsError
from compress_core.finite import first_bad
from compress_core.head import Halves

Progress = Callable[[int, int], None]
REST_FLOOR = 1e-9  # probability below which what is left of the vocabulary is taken to be


@dataclass(frozen=True)
class Teacher:
    """Top tokens of the dense model.

    Attributes:
        tokens: Their ids, int32 (windows, length, k).
        log_p: Their log probabilities, float32, the same shape, nats.
    """

    tokens: Tensor
    log_p: Tensor

    def at(self, windows: Tensor, device: torch.device | str) -> "Teacher":
        """That of windows int64 (batch,) alone on a device, as rows (batch * length, k)."""
        tokens = self.tokens[windows.to(self.tokens.device)].flatten(0, 1).to(device)
        log_p = self.log_p[windows.to(self.log_p.device)].flatten(0, 1).to(device)
        return Teacher(tokens, log_p)

    def divergence(self, logits: Tensor, rows: slice) -> Tensor:
        """Sum of KL(dense || model) over rows in nats, differentiable; of :meth:`at`.

        Args:
            logits: The model's, (rows, vocabulary).
            rows: Which rows these are.
        """
        tokens, log_p = self.tokens[rows].long(), self.log_p[rows]
        log_q = logits.float().log_softmax(-1)
        top = log_q.gather(-1, tokens)
        p = log_p.exp()
        divergence = (p * (log_p - top)).sum(-1)
        if tokens.shape[-1] < logits.shape[-1]:
            p_rest = (1 - p.sum(-1)).clamp_min(REST_FLOOR)
            q_rest = (1 - top.exp().sum(-1)).clamp_min(REST_FLOOR)
            divergence = divergence + p_rest * (p_rest.log() - q_rest.log())
        return divergence.sum()


@torch.no_grad()
def teach(
    model: Any,
    windows: Tensor,
    top: int,
    *,
    batch_size: int,
    device: str | torch.device,
    progress: Progress | None = None,
) -> Teacher:
    """The dense model's top tokens on windows (samples, length).

    Args:
        model: A causal language model on ``device``, in evaluation mode.
        windows: Token ids.
        top: Tokens kept at each position; at most the vocabulary.
        batch_size: Windows in one forward; it changes rounding only.
        device: Where the model is.
        progress: Called after each batch.

    Raises:
        NumericsError: Logits that are not finite; names the window.
    """
    halves = Halves(model)
    tokens, log_p = [], []
    done = 0
    for batch in windows.split(batch_size):
        hidden = halves.hidden(batch.to(device)).flatten(0, 1)
        for piece in halves.pieces(len(hidden)):
            logits = halves.logits(hidden[piece])
            bad = first_bad(logits)
            if bad is not None:
                window = done + (piece.start + bad) // windows.shape[1]
                raise NumericsError(f"the dense model's logits are not finite in window {window}")
            found = logits.float().log_softmax(-1).topk(min(top, logits.shape[-1]), dim=-1)
            tokens.append(found.indices.to(torch.int32).cpu())
            log_p.append(found.values.cpu())
        done += len(batch)
        if progress is not None:
            progress(done, len(windows))
    shape = (*windows.shape, -1)
    return Teacher(torch.cat(tokens).view(shape), torch.cat(log_p).view(shape))
