"""What recovery makes small: the distance to the dense model, and surprise at the text itself."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compress_core.gradients import loss_scale
from compress_core.head import Halves
from compress_core.learn.loop import Training, require_finite
from compress_core.learn.teacher import Teacher
from compress_core.types import ModelLayout

NOTHING = -100  # no token: behind the last one of a window there is nothing to predict


class Objective:
    """(1 - text) KL(dense || model) + text × cross-entropy, in nats per token.

    Args:
        model: On ``training.device``, in evaluation mode.
        layout: The dense model's layout.
        teacher: The dense model's predictions.
        training: Windows and device.
        text: Weight of the cross-entropy.
        batch: Windows in a step, and the most that are run at once.

    Attributes:
        scale: Of gradients; see :func:`compress_core.gradients.loss_scale`.
    """

    def __init__(
        self,
        model: Any,
        layout: ModelLayout,
        teacher: Teacher,
        training: Training,
        text: float,
        batch: int,
    ) -> None:
        self.model, self.layout, self.teacher = model, layout, teacher
        self.windows, self.device = training.windows, training.device
        self.text = text
        self.halves, self.batch = Halves(model), batch
        self.scale = loss_scale(model.dtype)

    def parts(self, picks: Tensor) -> tuple[Tensor, Tensor]:
        """KL and cross-entropy of some windows, differentiable."""
        tokens = self.windows[picks].to(self.device)
        taught = self.teacher.at(picks, self.device)
        following = F.pad(tokens[:, 1:], (0, 1), value=NOTHING).flatten()

        def measure(logits: Tensor, rows: slice) -> Tensor:
            text = F.cross_entropy(
                logits.float(), following[rows], ignore_index=NOTHING, reduction="sum"
            )
            return torch.stack((taught.divergence(logits, rows), text))

        hidden = self.halves.hidden(tokens).flatten(0, 1)
        kl, text = self.halves.total(hidden, measure)
        return kl / len(hidden), text / (len(hidden) - len(tokens))

    @torch.no_grad()
    def mean(self, picks: Tensor, step: int | None = None) -> float:
        """Of windows, without gradients; infinite where it is not finite.

        Args:
            picks: The windows, int64 (n,).
            step: Of the training, where it has to be finite.

        Raises:
            NumericsError: It is not.
        """
        total = 0.0
        for piece in picks.split(self.batch):
            kl, text = self.parts(piece)
            loss = (1 - self.text) * kl + self.text * text
            self._require_finite(loss, piece, step)
            total += float(loss) * len(piece)
        return total / len(picks) if total < torch.inf else torch.inf

    def descend(self, picks: Tensor, step: int | None) -> dict[str, float]:
        """Adds the gradient of a batch, times ``scale``, to the tensors that want one.

        Args:
            picks: The windows, int64 (batch,).
            step: Of the training, where the loss has to be finite.

        Returns:
            "kl" and "text" of the batch.

        Raises:
            NumericsError: The loss is not finite.
        """
        kl, text = self.parts(picks)
        loss = (1 - self.text) * kl + self.text * text
        self._require_finite(loss, picks, step)
        (loss * self.scale).backward()
        return {"kl": float(kl.detach()), "text": float(text.detach())}

    def _require_finite(self, loss: Tensor, piece: Tensor, step: int | None) -> None:
        if step is not None:
            tokens = self.windows[piece].to(self.device)
            require_finite(loss, "recovery", step, self.model, self.layout, tokens)
