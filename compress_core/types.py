"""The nouns every method speaks: a layer, a budget, and each layer's share of it.

One number of a dense weight costs 1; a rank-one component of an (out, in) layer costs out + in, or
less in another form than plain factors. Codes of few bits cost what they take in numbers of 16.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from compress_core.errors import BudgetError, ConfigError
from compress_core.forms.names import FULL, GROUP, PLAIN

Scope = Literal["compressible", "model"]


@dataclass(frozen=True)
class LayerRef:
    """One linear layer of a decoder block.

    Attributes:
        name: Module path, for instance ``model.layers.0.self_attn.q_proj``.
        block: Index of the decoder block it sits in.
        out_features: Rows of the weight in the (out, in) convention.
        in_features: Columns of the weight in the (out, in) convention.
        tap: Name of the first layer that reads the same input; statistics are kept once per tap.
        transposed: Whether the checkpoint stores the weight as (in, out), as GPT-2 does.
        form: In which a product of low rank will be stored, a key of ``FORMS``.
        bits: Of every number that will be stored, the dense weight's too where it stays.
        group: Codes of fewer bits than 16 that share a scale.
    """

    name: str
    block: int
    out_features: int
    in_features: int
    tap: str
    transposed: bool = False
    form: str = PLAIN
    bits: int = FULL
    group: int = GROUP

    @property
    def dense_cost(self) -> int:
        """Numbers of 16 bits that the dense weight takes in ``bits``."""
        if self.bits == FULL:
            return self.out_features * self.in_features
        from compress_core.forms.products import whole_cost  # with torch, as below

        return whole_cost(self.out_features, self.in_features, self.bits, self.group)

    @property
    def atom_cost(self) -> int:
        """Numbers that the first component adds; every one, where the form has one price."""
        return self.rank_cost(1)

    @property
    def paying_rank(self) -> int:
        """Largest rank whose product costs less than the dense weight.

        In codes none above that of 16 bits, so that decompositions are the same for both.
        """
        rank = self.affordable_rank(self.dense_cost - 1)
        return rank if self.bits == FULL else min(rank, self.in_full.paying_rank)

    @property
    def in_full(self) -> "LayerRef":
        """The layer with its numbers in 16 bits."""
        return replace(self, bits=FULL, group=GROUP)

    def rank_cost(self, rank: int, columns: int = 0) -> int:
        """Numbers that a product of a rank takes, and columns beside it with their index."""
        from compress_core.forms.products import kept_cost  # with torch, which settings do without

        return kept_cost(
            self.form, rank, columns, self.out_features, self.in_features, self.bits, self.group
        )

    def entries_cost(self, nonzeros: int) -> int:
        """Numbers that sparse entries take, without their places."""
        if self.bits == FULL:
            return nonzeros
        from compress_core.forms.products import entries_cost

        return entries_cost(nonzeros, self.out_features, self.in_features, self.bits, self.group)

    def affordable_rank(self, numbers: int) -> int:
        """Largest rank whose product takes no more than some numbers."""
        from compress_core.forms.products import largest_rank

        return largest_rank(
            self.form, numbers, self.out_features, self.in_features, self.bits, self.group
        )

    def ideal_rank(self, numbers: float) -> float:
        """The rank, with its fraction, that would take just so many numbers."""
        if self.form != "pivot" and self.form != "auto" and self.bits == FULL:
            return numbers / self.atom_cost
        rank = min(self.affordable_rank(int(numbers)), self.paying_rank)
        here, after = self.rank_cost(rank), self.rank_cost(rank + 1)
        return rank + (numbers - here) / (after - here)


@dataclass(frozen=True)
class ModelLayout:
    """Where the compressible layers of a model sit.

    Attributes:
        architecture: Class name, for instance ``LlamaForCausalLM``.
        base_class: Class name of the model without its head.
        base_prefix: Attribute that holds the base model, for instance ``model``.
        blocks: Module paths of the decoder blocks, in order.
        layers: Every compressible layer, in the order of blocks and of first use.
        dtype: Name of the floating dtype that the model computes in.
        block_parameters: Block index to the parameter names inside it.
        outer_parameters: Parameter names of the base model outside the blocks.
        block_buffers: Block index to the names of buffers that a checkpoint may hold.
        outer_buffers: The same outside the blocks.
        output_lengths: Block index to the length of the tuple that it returns, hidden states first;
            0 where it returns them by themselves.
        stored: Every parameter and stored buffer of the whole model to its key in the files.
        unused: Keys in the files that no model is made of.
        wrappers: Patterns of what is taken off the keys before transformers understands them.
    """

    architecture: str
    base_class: str
    base_prefix: str
    blocks: tuple[str, ...]
    layers: tuple[LayerRef, ...]
    dtype: str
    block_parameters: tuple[tuple[str, ...], ...]
    outer_parameters: tuple[str, ...]
    block_buffers: tuple[tuple[str, ...], ...]
    outer_buffers: tuple[str, ...]
    output_lengths: tuple[int, ...]
    stored: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    wrappers: tuple[str, ...] = ()

    def of_block(self, block: int) -> tuple[LayerRef, ...]:
        """The compressible layers of one block."""
        return tuple(layer for layer in self.layers if layer.block == block)

    def taps(self, block: int) -> dict[str, tuple[LayerRef, ...]]:
        """Tap name to the layers of ``block`` that share it."""
        taps: dict[str, list[LayerRef]] = {}
        for layer in self.of_block(block):
            taps.setdefault(layer.tap, []).append(layer)
        return {name: tuple(layers) for name, layers in taps.items()}


@dataclass(frozen=True)
class Stack:
    """Layers that are decomposed as one: weights stacked by rows, one in-factor for all.

    Most methods decompose every layer by itself: a stack of one.

    Attributes:
        members: The layers, all with the same ``in_features``.
    """

    members: tuple[LayerRef, ...]

    @property
    def form(self) -> str:
        """In which a member's product is stored: what is shared is so in plain factors."""
        return self.members[0].form if len(self.members) == 1 else PLAIN

    @property
    def as_layer(self) -> LayerRef:
        """The stack as the one layer that decompositions and allocators see."""
        first = self.members[0]
        if len(self.members) == 1:
            return first
        name = " + ".join(member.name for member in self.members)
        rows = sum(member.out_features for member in self.members)
        return LayerRef(name, first.block, rows, first.in_features, first.tap)


def affordable(kept: float, cost: int) -> int:
    """Whole numbers within ``kept`` of ``cost``; binary rounding of kept does not lose one."""
    return math.floor(kept * cost + 1e-6)


@dataclass(frozen=True)
class Share:
    """What one layer keeps.

    Attributes:
        rank: Its components; None for the dense weight.
        nonzeros: Entries of a sparse part beside them; each counts as one number, in codes as
            what it takes.
        bits: Of every number; None for what the layer says.
        correction: Where the components correct a whole weight, which is then in ``bits``: those of
            the components; None where there is no such weight.
        columns: Columns of the weight, for some of the inputs, beside components that read the
            others; each counts as its numbers and its index.
    """

    rank: int | None
    nonzeros: int = 0
    bits: int | None = None
    correction: int | None = None
    columns: int = 0

    def cost(self, layer: LayerRef) -> int:
        """Numbers stored for ``layer`` at this share."""
        if self.bits is not None:
            layer = replace(layer, bits=self.bits)
        if self.rank is None:
            return layer.dense_cost
        if self.correction is not None:
            return layer.dense_cost + replace(layer, bits=self.correction).rank_cost(self.rank)
        return layer.rank_cost(self.rank, self.columns) + layer.entries_cost(self.nonzeros)


def dense_or(rank: int, layer: LayerRef) -> Share:
    """A share of ``rank``, or the dense weight where factors of that rank would not pay."""
    return Share(rank if rank <= layer.paying_rank else None)


Allocation = Mapping[str, Share]  # layer name -> share


@dataclass(frozen=True)
class Budget:
    """The one dial: the share of parameters that stays.

    Attributes:
        kept: In (0, 1]; 0.6 keeps 60 %.
        of: Whether ``kept`` counts the compressible layers or the whole model.
    """

    kept: float
    of: Scope = "compressible"

    def __post_init__(self) -> None:
        if not 0.0 < self.kept <= 1.0:
            raise ConfigError(
                f"kept must be in (0, 1], got {self.kept:g}: it is the share of parameters that "
                "stays, so kept=0.8 removes 20 %"
            )
        if self.of not in ("compressible", "model"):
            raise ConfigError(f"kept can be measured of 'compressible' or 'model', got {self.of!r}")

    def of_compressible(self, layers: Sequence[LayerRef], model_parameters: int) -> float:
        """The share of the compressible layers that stays, whatever ``kept`` was measured on.

        Args:
            layers: Every compressible layer.
            model_parameters: Parameters of the whole model, each stored tensor counted once.

        Raises:
            BudgetError: The parameters outside the compressible layers exceed the budget alone.
        """
        if self.of == "compressible":
            return self.kept
        compressible = sum(layer.dense_cost for layer in layers)
        fixed = model_parameters - compressible
        wanted = self.kept * model_parameters - fixed
        if wanted <= 0:
            raise BudgetError(
                f"kept={self.kept:g} of the whole model leaves nothing for the layers: embeddings, "
                f"norms and head alone are {fixed / model_parameters:.3f} of it. Ask for more, or "
                "measure kept on the compressible layers"
            )
        return min(1.0, wanted / compressible)
