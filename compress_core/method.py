"""A compression method is data: one choice per stage."""

from collections.abc import Sequence
from dataclasses import dataclass

from compress_core.allocate.base import Allocator
from compress_core.allocate.uniform import Uniform
from compress_core.decompose import Decomposer, ProjectOutputs
from compress_core.errors import ConfigError
from compress_core.learn.base import Learner
from compress_core.metric import Unweighted, Weighting
from compress_core.prune.base import Pruner
from compress_core.refine.base import DENSE, PREFIX, Prefix, Refiner
from compress_core.types import LayerRef, Stack


@dataclass(frozen=True)
class Sharing:
    """Which layers have one in-factor in common: those of the same place in adjacent blocks.

    Attributes:
        blocks: Adjacent blocks in a group.
        private: Last parts of the names of layers that stay by themselves.
    """

    blocks: int
    private: tuple[str, ...]

    def stacks(self, layers: Sequence[LayerRef]) -> list[Stack]:
        """The groups, each at the place of its first layer.

        Raises:
            ConfigError: The groups do not divide the blocks.
        """
        count = max(layer.block for layer in layers) + 1
        if self.blocks < 1 or count % self.blocks:
            fitting = [str(n) for n in range(1, count + 1) if count % n == 0]
            raise ConfigError(
                f"groups of {self.blocks} blocks do not divide the model's {count} blocks; "
                f"groups of {', '.join(fitting)} do"
            )
        groups: dict[tuple[str, int, int, int], list[LayerRef]] = {}
        for layer in layers:
            place = layer.name.replace(f".{layer.block}.", ".*.", 1)
            alone = layer.name.rpartition(".")[2] in self.private
            group = layer.block if alone else -1 - layer.block // self.blocks
            key = (place, group, layer.in_features, layer.out_features)
            groups.setdefault(key, []).append(layer)
        return [Stack(tuple(members)) for members in groups.values()]


@dataclass(frozen=True)
class Method:
    """What each stage does.

    Attributes:
        name: What users type.
        summary: One line for the table of methods.
        paper: arXiv id, or "" for folklore.
        weighting: Metric of the error.
        decompose: Budget-free decomposition.
        allocate: How the budget is divided.
        refine: How a layer cut to its share is bettered; None leaves it.
        prefix: How inputs behind compressed layers are measured, for a refiner that reads them.
        sharing: Which layers have an in-factor in common; None for none.
        prune: What makes a layer of its share where nothing is decomposed beforehand.
        learn: What chooses among the decomposition's atoms by training, in place of ``allocate``.
        eight_bits: Whether components are stored in 8 bits. What is learned is then charged so, and
            such a model cannot be trained on.
    """

    name: str
    summary: str
    paper: str
    weighting: Weighting = Unweighted()
    decompose: Decomposer = ProjectOutputs()
    allocate: Allocator = Uniform()
    refine: Refiner | None = None
    prefix: Prefix = Prefix()
    sharing: Sharing | None = None
    prune: Pruner | None = None
    learn: Learner | None = None
    eight_bits: bool = False

    @property
    def reads_inputs(self) -> bool:
        """Whether it reads statistics of the layers' inputs in the dense model."""
        of_taps = self.weighting.needs & {"gram", "abs_sum"}
        return bool(of_taps) or DENSE in self._moments

    @property
    def needs_calibration(self) -> bool:
        """Whether it reads calibration text at all."""
        measured = self.allocate.reads & {"similarity", "divergence"}
        fitted = self.refine or self.prune or self.learn
        return bool(self.weighting.needs or measured or fitted is not None)

    @property
    def stores_entries(self) -> bool:
        """Whether layers may have sparse entries, whose places take bytes of their own."""
        learned = self.learn is not None and self.decompose.offers_entries
        return self.prune is not None or learned

    @property
    def sequential(self) -> bool:
        """Whether layers are measured behind compressed ones, and so done in order."""
        return PREFIX in self._moments

    @property
    def _moments(self) -> frozenset[str]:
        """Second moments that fitting a layer reads."""
        fitted = self.refine or self.prune
        return frozenset() if fitted is None else fitted.reads

    def stacks(self, layers: Sequence[LayerRef]) -> list[Stack]:
        """What is decomposed as one: every layer by itself unless in-factors are shared.

        Raises:
            ConfigError: The groups do not divide the model's blocks.
        """
        if self.sharing is None:
            return [Stack((layer,)) for layer in layers]
        return self.sharing.stacks(layers)
