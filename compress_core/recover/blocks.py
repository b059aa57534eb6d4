"""Recovery block by block: each is trained to give the dense block's output, those before it fixed.

As AA-SVD refines blocks (arXiv 2604.02119): a block reads what the compressed model before it gives
out, and is held against what the dense block gives out in the dense model, so that it makes up for
what came before, too. One block is in memory, and the hidden states of both models.

Trained are what compressed layers store and the block's vectors: norms, and biases that are no
compressible layer's. Layers left dense stay, and so does what more than one block has, such as an
in-factor that layers of several blocks share: the other blocks are not there to be asked.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from compress_core.errors import NumericsError
from compress_core.folder.stream import FolderStream
from compress_core.gradients import loss_scale
from compress_core.learn.loop import Training, TrainState, run_steps
from compress_core.recover.loss import Objective
from compress_core.recover.parts import Part, Stored, Whole, stored_tensors
from compress_core.recover.recovery import Recovered
from compress_core.recover.run import NUMBERS, RecoveryRun, _optimizer
from compress_core.recover.settings import LADDER, Recovery
from compress_core.recover.windows import split_windows

CURVES = {"kl": "error", "held_back": "held_back", "tried": "tried", "step_size": "step_size"}
"""What a recovery of the whole model calls a curve, to what one of blocks does."""


class BlockError(Objective):
    """The squared error of a block's outputs relative to the dense ones', mean over tokens.

    Every token counts alike, those too whose states are far larger than the others'. It stands
    where a recovery of the whole model has the divergence.

    Args:
        stream: With the block loaded that is trained.
        block: Index of the block.
        inputs: Hidden states (samples, length, hidden) that enter it in the compressed model.
        targets: Those that leave it in the dense model.
        batch: Windows in a step, and the most that are run at once.
    """

    def __init__(
        self, stream: FolderStream, block: int, inputs: Tensor, targets: Tensor, batch: int
    ) -> None:
        self.stream, self.block = stream, block
        self.inputs, self.targets = inputs, targets
        self.text, self.batch = 0.0, batch
        self.scale = loss_scale(stream.dtype)

    def parts(self, picks: Tensor) -> tuple[Tensor, Tensor]:
        """The error of some windows, differentiable, and nothing for their text."""
        wide = torch.promote_types(self.stream.dtype, torch.float32)
        targets = self.targets[picks].to(self.stream.device, wide)
        outputs = self.stream.differentiable(self.block, self.inputs[picks]).to(wide)
        size = targets.square().mean(-1).clamp_min(torch.finfo(wide).tiny)
        error = (outputs - targets).square().mean(-1) / size
        return error.mean(), error.new_zeros(())

    def _require_finite(self, loss: Tensor, piece: Tensor, step: int | None) -> None:
        if step is not None and not bool(loss.detach().isfinite()):
            raise NumericsError(
                f"recovery: the error of block {self.stream.layout.blocks[self.block]} is not "
                f"finite at step {step}. The last checkpoint is kept: change an option, or the "
                "text, and run again"
            )


class BlockRun(RecoveryRun):
    """The recovery of one block under way: as that of a whole model, of other parts and error.

    Args:
        tensors: What is trained.
        error: Of the block.
        recovery: How.
        windows: Token ids (samples, length), which say what may be trained on.
    """

    def __init__(
        self, tensors: Iterator[Stored], error: BlockError, recovery: Recovery, windows: Tensor
    ) -> None:
        # All that a run has, but of these: the base class would look for them in a whole model.
        self.recovery, self.objective = recovery, error
        self.trained, self.held = split_windows(windows, recovery.held_back, recovery.seed)
        self.parts: list[Part] = [Whole(stored) for stored in tensors]
        self.leaves = {part.stored.name: part.leaves[0] for part in self.parts}
        self.best = {name: leaf.cpu().clone() for name, leaf in self.leaves.items()}
        self.numbers = {name: torch.zeros((), dtype=torch.float64) for name in NUMBERS}
        self.trials = torch.full((recovery.sides, len(LADDER)), torch.nan, dtype=torch.float64)
        self.optimizer = _optimizer(self.parts)
        self.state = TrainState(self._named(), self.optimizer)
        self._side, self._active = None, []

    def step(self, number: int) -> tuple[Mapping[str, float], str]:
        """Does a step: what it measured, and a word on where the training stands."""
        measured, word = super().step(number)
        named = {CURVES[name]: value for name, value in measured.items() if name in CURVES}
        return named, word.replace("KL", "error")


def recover_block(
    stream: FolderStream,
    block: int,
    module: nn.Module,
    recovery: Recovery,
    states: tuple[Tensor, Tensor],
    training: Training,
) -> Recovered:
    """Trains what one block stores; everything else stays.

    Args:
        stream: With the block loaded from the compressed folder.
        block: Index of the block.
        module: The block; changed.
        recovery: How; the weight of text is not read.
        states: Hidden states (samples, length, hidden) that enter the block in the compressed
            model, and those that leave it in the dense one.
        training: Windows, and where checkpoints go; the seed is the recovery's.

    Returns:
        Tensors by their keys in the folder, and curves by the names in ``CURVES``; nothing of a
        block whose layers are all dense.

    Raises:
        ConfigError: Too few windows.
        NumericsError: An error that is not finite; names the block and the step.
    """
    recovery.check(len(training.windows))
    tensors = block_tensors(stream, block, module)
    error = BlockError(stream, block, *states, recovery.batch)
    run = BlockRun(tensors, error, recovery, training.windows)
    if not run.parts:
        return Recovered({}, {}, {})
    for rows in {recovery.batch, len(run.trained), len(run.held) % recovery.batch} - {0}:
        stream.prepare(training.windows[:rows], rows)
    curves = run_steps(recovery.all_steps, run.step, run.state, training)
    return Recovered(run.result(), curves, run.report())


def block_tensors(stream: FolderStream, block: int, module: nn.Module) -> Iterator[Stored]:
    """What is trained of a block that is loaded from its folder; nothing if no layer is compressed.

    Args:
        stream: Knows the folder.
        block: Index of the block.
        module: The block.
    """
    path = stream.layout.blocks[block]
    layers = {layer.name for layer in stream.layout.of_block(block)}
    found = [(stored.name, stored.tensor) for stored in stored_tensors(module)]
    if found:
        found += [
            (name, tensor)
            for name, tensor in module.named_parameters()
            if tensor.ndim == 1 and f"{path}.{name}".rpartition(".")[0] not in layers
        ]
    for name, tensor in found:
        key = stream.key(f"{path}.{name}")
        if key not in stream.tied:
            layer, _, part = key.rpartition(".")
            dtype = stream.compressed.torch_dtype(key)
            yield Stored(layer, part, tensor, dtype=dtype)
