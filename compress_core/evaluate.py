"""How good a model still is: perplexity on token windows, and its divergence from the dense model.

Both are means over predicted tokens: in a window of L tokens the tokens 2..L are predicted from
those before them, so n windows average n * (L - 1) terms, every one with equal weight.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from compress_core.errors import NumericsError, TextError
from compress_core.head import chunks

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
        by_window: nll of every window: their mean is nll.
    """

    perplexity: float
    nll: float
    kl: float | None
    windows: int
    length: int
    tokens: int
    by_window: tuple[float, ...]


class Evaluated(Protocol):
    """A causal language model; `compress_core.hf.streamed.Streamed` is one, block by block."""

    def hidden(self, first: int, ids: Tensor) -> Tensor:
        """The last hidden states (batch, length, width) of the windows from number `first` on."""
        ...

    def logits(self, rows: Tensor) -> Tensor:
        """The logits (rows, vocabulary) of rows (rows, width) of those."""
        ...

    def pieces(self, rows: int) -> list[slice]:
        """So many rows in parts, the logits of one of which are held at a time."""
        ...


@torch.inference_mode()
def perplexity_and_kl(
    model: Evaluated,
    windows: Tensor,
    *,
    reference: Evaluated | None = None,
    batch_size: int = 8,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> TextMetrics:
    """Perplexity of a causal language model, and its KL divergence from a reference model.

    Both models see the same batch one after the other. Held are, beside what a model itself holds,
    the last hidden states of one batch, and of each model one piece of its logits, at most 64 MiB
    in float32, some rows of which are in float64, too. The softmax and sums are in float64, so the
    batch size changes rounding only.

    Args:
        model: A causal language model.
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
    kl, of_batches = 0.0, []
    for start in range(0, count, batch_size):
        ids = windows[start : start + batch_size].to(device)
        of_batch, batch_kl = _batch(start, ids, model, reference)
        of_batches.append(of_batch.cpu())
        kl += batch_kl
        if progress:
            progress(min(start + batch_size, count), count)
    tokens = count * (length - 1)
    nlls = torch.cat(of_batches)
    nll, kl = float(nlls.mean()), max(kl / tokens, 0.0)  # below 0 it can only be by rounding
    if nll > _LARGEST_NLL:
        raise NumericsError(f"evaluate: perplexity exp({nll:.4g}) is beyond float64")
    divergence = None if reference is None else kl
    by_window = tuple(nlls.tolist())
    return TextMetrics(math.exp(nll), nll, divergence, count, length, tokens, by_window)


def _batch(
    first: int, ids: Tensor, model: Evaluated, dense: Evaluated | None
) -> tuple[Tensor, float]:
    """Mean negative log likelihood of every window, and the sum of KL (0 without `dense`).

    Args:
        first: Number of its first window, for messages.
        ids: Token ids (batch, length).
        model: The model.
        dense: The reference model.
    """
    rows = model.hidden(first, ids)[:, :-1].flatten(0, 1)
    dense_rows = None if dense is None else dense.hidden(first, ids)[:, :-1].flatten(0, 1)
    targets = ids[:, 1:].flatten()
    nll = torch.empty(len(rows), dtype=torch.float64, device=ids.device)
    kl = torch.zeros_like(nll)
    for piece in model.pieces(len(rows)):
        logits = model.logits(rows[piece])
        dense_logits = None
        if dense is not None and dense_rows is not None:
            dense_logits = dense.logits(dense_rows[piece])
        for part in chunks(logits):
            place = _Place(first, ids.shape[1] - 1, piece.start + part.start)
            q = _Softmax(logits[part], "the model", place)
            own = q.logits.gather(-1, targets[piece][part, None])[:, 0]
            nll[piece][part] = q.log_sum - own
            if dense_logits is not None:
                p = _Softmax(dense_logits[part], "the dense model", place)
                gap = p.logits.sub_(q.logits)
                cross = torch.linalg.vecdot(p.weights, gap) / p.sum
                kl[piece][part] = cross - p.log_sum + q.log_sum
        del logits, dense_logits  # or two pieces of each would be held
    return nll.unflatten(0, (len(ids), -1)).mean(dim=1), float(kl.sum())


@dataclass(frozen=True)
class _Place:
    """Where rows of logits stand.

    Attributes:
        window: Number of the batch's first window.
        predicted: Rows of a window.
        row: The first of the rows, counted in the batch.
    """

    window: int
    predicted: int
    row: int

    def name(self, index: int) -> str:
        """Window and position of the row that comes so many rows later."""
        window, position = divmod(self.row + index, self.predicted)
        return f"window {self.window + window}, position {position}"


class _Softmax:
    """Rows of logits and what their softmax is made of, one exponential of each.

    Attributes:
        logits: (rows, vocabulary), float64.
        weights: exp(logits - the row's largest); over ``sum`` they are the probabilities.
        sum: Of the weights, (rows,).
        log_sum: log Σ exp(logits), (rows,).
    """

    def __init__(self, logits: Tensor, whose: str, place: _Place) -> None:
        self.logits = logits.double()
        bad = self.logits.sum(-1).isfinite().logical_not_()
        if bad.any():
            where = place.name(int(bad.nonzero()[0]))
            raise NumericsError(
                f"evaluate: the logits of {whose} in {where}, are not finite; "
                "its weights are broken or its dtype overflows"
            )
        largest = self.logits.amax(-1, keepdim=True)
        self.weights = (self.logits - largest).exp_()
        self.sum = self.weights.sum(-1)
        self.log_sum = largest[:, 0] + self.sum.log()
