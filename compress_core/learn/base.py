"""What every learner is: it chooses, by training on the whole model, what each layer keeps.

A learner divides the budget itself; the layers' decompositions do not know it and serve all.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from compress_core.decompose import LowRank
from compress_core.learn.loop import Step, Training, TrainState, run_steps, saving_memory
from compress_core.learn.teacher import Teacher
from compress_core.record import Packed, Record
from compress_core.sparse import Sparse, pack_bits, unpack_bits
from compress_core.types import LayerRef, ModelLayout


@dataclass(frozen=True)
class Atoms:
    """Everything that a layer can keep: W = utᵀ v + sparse, in float32.

    Attributes:
        ut: (components, out), unit rows.
        v: (components, in).
        energy: Squared error of leaving one component out, float64 (components,).
        sparse: Entries, or None.
    """

    ut: Tensor
    v: Tensor
    energy: Tensor
    sparse: Sparse | None = None


@dataclass(frozen=True)
class Chosen:
    """What a layer keeps of its atoms.

    Attributes:
        index: Components that stay, (rank,) int64; None where the layer stays dense as it was.
        scale: What each is multiplied by, (rank,).
        entries: Which of the sparse entries stay, (nonzeros,) bool, row by row; None for none.
        bias: Added to the layer's bias, (out,); None for nothing.
    """

    index: Tensor | None
    scale: Tensor | None = None
    entries: Tensor | None = None
    bias: Tensor | None = None

    def same(self, other: "Chosen") -> bool:
        """Whether the same is kept, to the bit."""
        parts = ("index", "scale", "entries", "bias")
        pairs = [(getattr(self, part), getattr(other, part)) for part in parts]
        return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)

    def pack(self) -> Packed:
        """What is kept of it; the entries that stay as bits."""
        attrs: dict[str, Any] = {"rank": None if self.index is None else len(self.index)}
        if self.index is None or self.scale is None:
            return Packed({}, attrs)
        tensors = {"index": self.index.to(torch.int32), "scale": self.scale.to(torch.float32)}
        if self.bias is not None:
            tensors["bias"] = self.bias.to(torch.float32)
        if self.entries is not None:
            attrs["entries"] = len(self.entries)
            tensors["entries"] = pack_bits(self.entries)
        return Packed(tensors, attrs)

    @classmethod
    def unpack(cls, record: Record) -> "Chosen":
        """What :meth:`pack` kept."""
        if record.attrs["rank"] is None:
            return cls(None)
        entries = None
        if "entries" in record.attrs:
            entries = unpack_bits(record.tensor("entries"), int(record.attrs["entries"]))
        bias = record.tensor("bias") if "bias" in record.names else None
        index = record.tensor("index").to(torch.int64)
        return cls(index, record.tensor("scale"), entries, bias)

    def cost(self, layer: LayerRef) -> int:
        """Numbers stored for ``layer``; where an entry is does not count, as in the papers."""
        if self.index is None:
            return layer.dense_cost
        entries = 0 if self.entries is None else int(self.entries.sum())
        bias = 0 if self.bias is None else self.bias.numel()
        return layer.rank_cost(len(self.index)) + entries + bias


def pick(atoms: Atoms, chosen: Chosen) -> LowRank | None:
    """The chosen atoms, scales folded into the in-factor; None where the layer stays dense."""
    if chosen.index is None or chosen.scale is None:
        return None
    u = atoms.ut[chosen.index].T.contiguous()
    v = atoms.v[chosen.index] * chosen.scale[:, None]
    sparse = None
    if atoms.sparse is not None and chosen.entries is not None:
        mask = atoms.sparse.mask.masked_scatter(atoms.sparse.mask, chosen.entries)
        sparse = Sparse(mask, atoms.sparse.values[chosen.entries])
    return LowRank(u, v, sparse=sparse, bias=chosen.bias)


@dataclass(frozen=True)
class Learned:
    """What a training found.

    Attributes:
        chosen: Layer name to what it keeps, for every layer.
        curves: What was measured on the way, float64 (steps,) each: "kl", "kept" and more.
        report: Numbers about the end result.
    """

    chosen: Mapping[str, Chosen]
    curves: Mapping[str, Tensor]
    report: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Assignment:
    """What a learner is given.

    Attributes:
        model: The whole dense model in evaluation mode on ``training.device``; the learner's own
            copy, which it may change.
        layout: Its layout.
        atoms: Reads a layer's atoms, on the CPU.
        kept: In (0, 1], of the compressible parameters.
        teacher: The dense model's logits on the same windows, if the learner ``reads_teacher``.
        training: Windows, seed, and where checkpoints go.
    """

    model: Any
    layout: ModelLayout
    atoms: Callable[[LayerRef], Atoms]
    kept: float
    teacher: Teacher | None
    training: Training


def train_whole(given: Assignment, steps: int, step: Step, state: TrainState) -> dict[str, Tensor]:
    """Curves of a training whose steps each run the whole model on one batch, saving memory."""
    training = given.training
    tokens = min(training.batch_size, len(training.windows)) * training.windows.shape[1]
    with saving_memory(given.model, given.layout, tokens):
        return run_steps(steps, step, state, training)


class Learner(Protocol):
    """Trains on the whole model under one budget."""

    @property
    def steps(self) -> int:
        """Steps of the whole training."""
        ...

    @property
    def batch(self) -> int:
        """Windows in one step."""
        ...

    @property
    def reads_teacher(self) -> bool:
        """Whether it needs the dense model's logits."""
        ...

    @property
    def biases(self) -> bool:
        """Whether layers may get a bias that the dense ones had not."""
        ...

    def check(self, layers: Sequence[LayerRef], kept: float, samples: int) -> None:
        """Refuses what shapes, budget and calibration windows alone show to be impossible.

        Raises:
            BudgetError, ConfigError: It cannot be.
        """
        ...

    def learn(self, given: Assignment) -> Learned:
        """Chooses; never spends more than the budget.

        Raises:
            NumericsError: A loss that is not finite; names the step and the layer.
        """
        ...
