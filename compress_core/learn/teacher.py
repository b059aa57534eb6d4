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

Progress = Callable[[int, int], None]
REST_FLOOR = 1e-9  # probability below which what is left of the vocabulary is taken to be


@dataclass(frozen=True)
class Teacher:
    """Top tokens of the dense model.

    Attributes:
        tokens: Their ids, int32 (windows, length, k).
        log_p: Their log probabilities, float32 (windows, length, k), nats.
    """

    tokens: Tensor
    log_p: Tensor

    def divergence(self, logits: Tensor, windows: Tensor) -> Tensor:
        """Mean KL(dense || model) in nats per token, differentiable.

        Args:
            logits: The model's, (batch, length, vocabulary).
            windows: Which windows these are, int64 (batch,).
        """
        device = logits.device
        tokens = self.tokens[windows.to(self.tokens.device)].to(device).long()
        log_p = self.log_p[windows.to(self.log_p.device)].to(device)
        log_q = logits.float().log_softmax(-1)
        top = log_q.gather(-1, tokens)
        p = log_p.exp()
        divergence = (p * (log_p - top)).sum(-1)
        if tokens.shape[-1] < logits.shape[-1]:
            p_rest = (1 - p.sum(-1)).clamp_min(REST_FLOOR)
            q_rest = (1 - top.exp().sum(-1)).clamp_min(REST_FLOOR)
            divergence = divergence + p_rest * (p_rest.log() - q_rest.log())
        return divergence.mean()


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
    tokens, log_p = [], []
    done = 0
    for batch in windows.split(batch_size):
        logits = model(input_ids=batch.to(device), use_cache=False).logits
        finite = logits.isfinite().flatten(1).all(1)
        if not finite.all():
            window = done + int((~finite).nonzero()[0])
            raise NumericsError(f"the dense model's logits are not finite in window {window}")
        found = logits.float().log_softmax(-1).topk(min(top, logits.shape[-1]), dim=-1)
        tokens.append(found.indices.to(torch.int32).cpu())
        log_p.append(found.values.cpu())
        done += len(batch)
        if progress is not None:
            progress(done, len(windows))
    return Teacher(torch.cat(tokens), torch.cat(log_p))
