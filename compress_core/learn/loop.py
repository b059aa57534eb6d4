"""The loop that every training shares: it can stop anywhere and go on with the same numbers.

All that changes from step to step is in a :class:`TrainState`, which turns into tensors and back.
Which windows a step sees follows from seed and step alone.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from compress_core.errors import ConfigError, NumericsError
from compress_core.finite import all_finite
from compress_core.gradients import loss_scale
from compress_core.types import ModelLayout

CHECKPOINTED_BYTES = 1 << 30
"""Activations of a batch above which blocks are run again in the backward pass, in bytes."""
SAVES = 20  # checkpoints of a training, at most
LEAST_WINDOWS = 8  # to train on


class Checkpoints(Protocol):
    """Where a training's state is kept while it goes on."""

    def load(self) -> dict[str, Tensor] | None:
        """The latest state, or None at the beginning."""
        ...

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Keeps the state after ``step`` steps in place of earlier ones."""
        ...


class NoCheckpoints:
    """Keeps nothing."""

    def load(self) -> dict[str, Tensor] | None:
        """Nothing."""
        return None

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Forgets it."""


@dataclass(frozen=True)
class Training:
    """What every training is given.

    Attributes:
        windows: Token ids (samples, length), on the CPU.
        device: Where the model is.
        batch_size: Windows in one step; it decides the numbers.
        seed: Of the order of windows and of every draw.
        checkpoints: Where the state is kept.
        progress: Called after each step: steps done, steps in all, and a word on where it stands.
    """

    windows: Tensor
    device: str
    batch_size: int
    seed: int
    checkpoints: Checkpoints = field(default_factory=NoCheckpoints)
    progress: Callable[[int, int, str], None] = lambda done, total, detail: None


class TrainState:
    """Everything that a training changes.

    Args:
        tensors: Name to tensor, changed in place; parameters, and whatever else is remembered.
        optimizer: Its moments belong to the state too.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        self.tensors = dict(tensors)
        self.optimizer = optimizer

    def save(self) -> dict[str, Tensor]:
        """Copies of everything, on the CPU."""
        found = {f"state.{name}": tensor for name, tensor in self.tensors.items()}
        for place, value in self._moments():
            found[f"optimizer.{place}"] = value
        return {name: tensor.detach().cpu().clone() for name, tensor in found.items()}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Puts a saved state in place."""
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(saved[f"state.{name}"])
        if self.optimizer is None:
            return
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in saved.items():
            if name.startswith("optimizer."):
                _, index, part = name.split(".")
                moments.setdefault(int(index), {})[part] = tensor.clone()
        state = self.optimizer.state_dict()
        self.optimizer.load_state_dict({**state, "state": moments})

    def _moments(self) -> Iterator[tuple[str, Tensor]]:
        if self.optimizer is not None:
            for index, parts in self.optimizer.state_dict()["state"].items():
                for part, value in parts.items():
                    yield f"{index}.{part}", torch.as_tensor(value)


Step = Callable[[int], tuple[Mapping[str, float], str]]


def run_steps(steps: int, step: Step, state: TrainState, training: Training) -> dict[str, Tensor]:
    """Runs what is left of a training.

    Args:
        steps: Of the whole training.
        step: Does the step of this number, counted from 0; gives what goes into the curves, and a
            word on where it stands for the progress bar.
        state: What it changes.
        training: Where checkpoints go, and who is told of progress.

    Returns:
        Curves: name to float64 (steps,), not-a-number where a step did not give that name.
    """
    curves: dict[str, Tensor] = {}
    begin = 0
    saved = training.checkpoints.load()
    if saved is not None:
        state.load(saved)
        begin = int(saved["step"])
        curves = {
            name.removeprefix("curve."): tensor.clone()
            for name, tensor in saved.items()
            if name.startswith("curve.")
        }
    every = max(1, -(-steps // SAVES))
    for number in range(begin, steps):
        measured, word = step(number)
        for name, value in measured.items():
            if name not in curves:
                curves[name] = torch.full((steps,), torch.nan, dtype=torch.float64)
            curves[name][number] = value
        if (number + 1) % every == 0 and number + 1 < steps:
            kept = {f"curve.{name}": tensor for name, tensor in curves.items()}
            tensors = {**state.save(), **kept, "step": torch.tensor(number + 1)}
            training.checkpoints.save(number + 1, tensors)
        training.progress(number + 1, steps, word)
    return curves


def batch_of(step: int, samples: int, batch_size: int, seed: int) -> Tensor:
    """Which windows a step sees, int64 (batch,): every epoch is a new shuffle of all windows."""
    batch_size = min(batch_size, samples)
    found: list[Tensor] = []
    position, left = step * batch_size, batch_size
    while left:
        epoch, start = divmod(position, samples)
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % (1 << 62))
        part = torch.randperm(samples, generator=generator)[start : start + left]
        found.append(part)
        position += len(part)
        left -= len(part)
    return torch.cat(found)


def next_batch(step: int, training: Training) -> tuple[Tensor, Tensor]:
    """Which windows a step sees, and their tokens (batch, length) on the device."""
    windows = batch_of(step, len(training.windows), training.batch_size, training.seed)
    return windows, training.windows[windows].to(training.device)


def descend(
    loss: Tensor, optimizer: torch.optim.Optimizer, leaves: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """The gradients of a loss by the leaves, in place of those that they had.

    Args:
        loss: A scalar.
        optimizer: Of the leaves.
        leaves: In float32.
        dtype: That the model computes in; see :func:`compress_core.gradients.loss_scale`.
    """
    scale = loss_scale(dtype)
    optimizer.zero_grad()
    (loss * scale).backward()
    for leaf in leaves:
        if leaf.grad is not None and scale != 1:
            leaf.grad /= scale


def require_finite_parameters(parameters: Iterable[Tensor], method: str) -> None:
    """Refuses the end of a training whose last step broke it; losses show that one step later.

    Raises:
        NumericsError: A parameter is not finite.
    """
    if not all(map(all_finite, parameters)):
        raise NumericsError(
            f"{method}: the last step of the training left parameters that are not finite. The "
            "last checkpoint is kept: change an option, or the text, and run again"
        )


def check_samples(samples: int) -> None:
    """Refuses to train on next to nothing.

    Raises:
        ConfigError: Fewer calibration windows than that.
    """
    if samples < LEAST_WINDOWS:
        raise ConfigError(
            f"{samples} calibration windows are too few to train on: give --samples of at least "
            f"{LEAST_WINDOWS}"
        )


def require_finite(
    loss: Tensor, method: str, step: int, model: Any, layout: ModelLayout, tokens: Tensor
) -> None:
    """Stops a training whose loss is not finite.

    Raises:
        NumericsError: It is not; names the step, and the first layer whose output is not finite.
    """
    if all_finite(loss):
        return
    layer = first_bad_layer(model, layout, tokens)
    where = f"layer {layer}" if layer else "the loss itself, no layer"
    raise NumericsError(
        f"{method}: the loss is not finite at step {step}; the first output that is not is that of "
        f"{where}. The last checkpoint is kept: change an option, or the text, and run again"
    )


@torch.no_grad()
def first_bad_layer(model: Any, layout: ModelLayout, tokens: Tensor) -> str | None:
    """Name of the first layer in order whose output is not finite; None where all are."""
    bad: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(_: Any, __: Any, output: Tensor) -> None:
            if not all_finite(output):
                bad.append(name)

        return hook

    handles = [
        model.get_submodule(layer.name).register_forward_hook(watch(layer.name))
        for layer in layout.layers
    ]
    try:
        model.base_model(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return bad[0] if bad else None


def kept_activations(layout: ModelLayout, tokens: int) -> int:
    """Bytes of what all layers read and give, in float32, for so many tokens."""
    return 4 * tokens * sum(layer.in_features + layer.out_features for layer in layout.layers)


def runs_again(layout: ModelLayout, tokens: int) -> bool:
    """Whether blocks are run again in the backward pass of so many tokens."""
    return kept_activations(layout, tokens) > CHECKPOINTED_BYTES


@contextmanager
def saving_memory(model: Any, layout: ModelLayout, tokens: int) -> Iterator[None]:
    """While it is open, blocks keep no activations for the backward pass where those are many.

    The numbers are the same. The model stays in evaluation mode, so that nothing is dropped out.

    Args:
        model: The whole model.
        layout: Its layout.
        tokens: In one batch.
    """
    if not runs_again(layout, tokens):
        yield
        return
    blocks = [model.get_submodule(path) for path in layout.blocks]
    try:
        for block in blocks:
            block.forward = _checkpointed(block.forward)
        yield
    finally:
        for block in blocks:
            del block.forward


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
