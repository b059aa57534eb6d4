"""A compression method is data: one choice per stage."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from compress_core.allocate.base import Allocator
from compress_core.allocate.corrections import Corrections
from compress_core.allocate.uniform import Uniform
from compress_core.allocate.widths import Widths
from compress_core.coding.settings import Coding
from compress_core.decompose import Decomposer, ProjectOutputs
from compress_core.errors import ConfigError
from compress_core.fit import DENSE, PREFIX, Fitter, Prefix
from compress_core.forms.names import FULL, PLAIN
from compress_core.learn.base import Learner
from compress_core.metric import Unweighted, Weighting
from compress_core.prune.columns import FitColumns, PrefixFitColumns
from compress_core.prune.fitted import FitEntries, PrefixFitEntries
from compress_core.two_sided import TwoSided
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
        weighting: Metric of the error, over a layer's inputs.
        two_sided: How errors of its outputs count in that metric; None where they all count alike.
        decompose: Budget-free decomposition; None for a method that prunes, whose fitter begins
            with the weight and a share.
        allocate: How the budget is divided.
        fit: How a layer cut to its share is bettered, or made where nothing is decomposed; None
            leaves it as it was cut.
        entries: What makes a layer of entries where its share has some, in a method that
            decomposes; None where none ever has.
        columns: The same of some columns of its weight.
        prefix: How inputs behind compressed layers are measured, for a fitter that reads them.
        sharing: Which layers have an in-factor in common; None for none.
        learn: What chooses among the decomposition's atoms by training, in place of ``allocate``.
        form: In which a product of low rank is stored and charged, a key of ``FORMS``; what layers
            share stays plain. A model in 8 bits cannot be trained on.
        coding: How what is stored is rounded to codes of few bits, where its share says so; None
            where none ever does.
    """

    name: str
    summary: str
    paper: str
    weighting: Weighting = Unweighted()
    two_sided: TwoSided | None = None
    decompose: Decomposer | None = ProjectOutputs()
    allocate: Allocator = Uniform()
    fit: Fitter | None = None
    entries: FitEntries | PrefixFitEntries | None = None
    columns: FitColumns | PrefixFitColumns | None = None
    prefix: Prefix = Prefix()
    sharing: Sharing | None = None
    learn: Learner | None = None
    form: str = PLAIN
    coding: Coding | None = None

    @property
    def reads_inputs(self) -> bool:
        """Whether it reads statistics of the layers' inputs in the dense model."""
        of_taps = self.weighting.needs & {"gram", "abs_sum"}
        curves = self.allocate.reads & {"predicted", "codes"}
        return bool(of_taps or curves) or DENSE in self.moments

    @property
    def needs_calibration(self) -> bool:
        """Whether it reads calibration text at all."""
        measured = self.allocate.reads - {"losses"}
        fitted = bool(self.moments) or self.learn is not None
        weighed = self.weighting.needs or self.two_sided is not None
        return bool(weighed or measured or fitted)

    @property
    def rounds(self) -> bool:
        """Whether layers keep their whole weight, in codes of few bits."""
        return isinstance(self.allocate, Widths) or self.corrects

    @property
    def corrects(self) -> bool:
        """Whether a product of low rank beside such a weight makes up for what rounding took."""
        return isinstance(self.allocate, Corrections)

    @property
    def prunes(self) -> bool:
        """Whether layers are made of their weight and share, with no decomposition beforehand."""
        return self.decompose is None and not self.rounds

    @property
    def stores_entries(self) -> bool:
        """Whether layers may have sparse entries that nothing but their number is paid for."""
        if self.decompose is None:
            return self.prunes
        return self.learn is not None and self.decompose.offers_entries

    @property
    def fitters(self) -> tuple[Fitter, ...]:
        """What makes layers of their shares, beyond cutting them."""
        fitters = (self.fit, self.entries, self.columns)
        return tuple(fitter for fitter in fitters if fitter is not None)

    @property
    def sequential(self) -> bool:
        """Whether layers are measured behind compressed ones, and so done in order."""
        return PREFIX in self.moments

    @property
    def essence(self) -> "Method":
        """What it does, under no name: equal for two methods that do the same."""
        prefix = self.prefix if self.sequential else Prefix()
        return replace(self, name="", summary="", paper="", prefix=prefix)

    @property
    def moments(self) -> frozenset[str]:
        """Second moments that fitting a layer and rounding it reads."""
        fitted = frozenset[str]().union(*(fitter.reads for fitter in self.fitters))
        rounded = self.coding is not None and self.coding.reads_inputs and PREFIX not in fitted
        return fitted | {DENSE} if rounded else fitted

    def stacks(self, layers: Sequence[LayerRef]) -> list[Stack]:
        """What is decomposed as one: every layer by itself unless in-factors are shared.

        Raises:
            ConfigError: The groups do not divide the model's blocks.
        """
        if self.sharing is None:
            return [Stack((self._priced(layer),)) for layer in layers]
        return [
            Stack((self._priced(found.members[0]),)) if len(found.members) == 1 else found
            for found in self.sharing.stacks(layers)
        ]

    def _priced(self, layer: LayerRef) -> LayerRef:
        """The layer with what its numbers will cost."""
        if self.coding is None:
            return replace(layer, form=self.form)
        bits = self.coding.bits or FULL
        return replace(layer, form=self.form, bits=bits, group=self.coding.group)
