"""How good a model still is: perplexity on token windows, and its divergence from the dense model.

Both are means over predicted tokens: in a window of L tokens the tokens 2..L are predicted from
those before them, so n windows average n * (L - 1) terms, every one with equal weight.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress_core.errors import NumericsError, TextError

CHUNK_ELEMENTS = 1 << 21
"""Logits widened to float64 at a time (16 MiB a copy, three copies); bounds memory, not results."""

_LARGEST_NLL = math.log(torch.finfo(torch.float64).max)


@dataclass(frozen=True)
class TextMetrics:
    """What one evaluation found.

    Attributes:
        perplexity: exp(nll).
        nll: Mean negative log likelihood, nats per predicted token.
        kl: Mean KL(dense || this model), nats per predicted token; None without a dense model.
        windows: Windows evaluated.
        length: Tokens in each window.
        tokens: Predicted tokens, windows * (length - 1).
    """

    perplexity: float
    nll: float
    kl: float | None
    windows: int
    length: int
    tokens: int


@torch.inference_mode()
def perplexity_and_kl(
    model: nn.Module,
    windows: Tensor,
    *,
    reference: nn.Module | None = None,
    batch_size: int = 8,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> TextMetrics:
    """Perplexity of a causal language model, and its KL divergence from a reference model.

    Both models see the same batch one after the other; the logits of one batch are all that is
    held. Log-softmax and sums are in float64, so the batch size changes rounding only.

    Args:
        model: Called as `model(input_ids=..., use_cache=False).logits`; set to eval mode.
        windows: int64 token ids (n, length).
        reference: The dense model, with the same vocabulary.
        batch_size: Windows in one forward pass.
        device: Where both models are; the windows are moved there batch by batch.
        progress: Called after each batch with windows done and windows in all.

    Raises:
        TextError: No windows, or windows with nothing to predict.
        NumericsError: Logits that are not finite; names the window, which is never dropped.
    """
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        shape = tuple(windows.shape)
        raise TextError(f"windows have shape {shape}; expected (n >= 1, length >= 2)")
    count, length = windows.shape
    model.eval()
    if reference is not None:
        reference.eval()
    nll = kl = 0.0
    for start in range(0, count, batch_size):
        ids = windows[start : start + batch_size].to(device)
        logits = model(input_ids=ids, use_cache=False).logits
        dense = None
        if reference is not None:
            dense = reference(input_ids=ids, use_cache=False).logits
        for row, window in enumerate(ids):
            name = f"window {start + row}"
            row_dense = None if dense is None else dense[row]
            row_nll, row_kl = _window_sums(name, window, logits[row], row_dense)
            nll, kl = nll + row_nll, kl + row_kl
        if progress:
            progress(min(start + batch_size, count), count)
    tokens = count * (length - 1)
    nll, kl = nll / tokens, max(kl / tokens, 0.0)  # below zero it can only be by rounding
    if nll > _LARGEST_NLL:
        raise NumericsError(f"evaluate: perplexity exp({nll:.4g}) is beyond float64")
    divergence = None if reference is None else kl
    return TextMetrics(math.exp(nll), nll, divergence, count, length, tokens)


def _window_sums(
    name: str, window: Tensor, logits: Tensor, dense: Tensor | None
) -> tuple[float, float]:
    """Sums of negative log likelihood and of KL divergence (0 without `dense`) over one window.

    Args:
        name: Of the window, for messages.
        window: Token ids (length).
        logits: Of the model (length, vocabulary).
        dense: Of the reference model, the same shape.
    """
    nll = torch.zeros((), dtype=torch.float64, device=window.device)
    kl = torch.zeros_like(nll)
    step = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    for begin in range(0, len(window) - 1, step):
        end = min(begin + step, len(window) - 1)
        log_q = _log_softmax(logits[begin:end], f"the model in {name}", begin)
        nll -= log_q.gather(-1, window[begin + 1 : end + 1, None]).sum()
        if dense is not None:
            log_p = _log_softmax(dense[begin:end], f"the dense model in {name}", begin)
            gap = log_q.neg_().add_(log_p)
            kl += log_p.exp_().mul_(gap).sum()
    return float(nll), float(kl)


def _log_softmax(logits: Tensor, where: str, begin: int) -> Tensor:
    bad = torch.isfinite(logits).all(-1).logical_not_()
    if bad.any():
        position = begin + int(bad.nonzero()[0])
        raise NumericsError(
            f"evaluate: the logits of {where}, position {position}, are not finite; "
            "its weights are broken or its dtype overflows"
        )
    return logits.double().log_softmax(-1)
