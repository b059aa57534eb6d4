"""Stage ``realise``: a decomposition and a share become the factors that will be stored."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor

from compress_core.coding.parts import CodedParts
from compress_core.coding.whole import of_whole
from compress_core.decompose import LowRank
from compress_core.fit import DENSE, Fitter
from compress_core.forms.names import FULL, PLAIN
from compress_core.layer.make import Given, code_share, realise_chosen, realise_share, rows_of
from compress_core.layer.stored import pack_layer, stored_weight
from compress_core.learn.base import Chosen
from compress_core.record import Packed
from compress_core.stats import InputStats, PrefixStats
from compress_core.two_sided import FitTwoSided
from compress_core.types import LayerRef, Share
from tasks.engine.components import describe
from tasks.engine.cost import EXACT, Cost, add
from tasks.engine.job import Job
from tasks.engine.units import Unit
from tasks.engine.work import Group, Work
from tasks.stages.allocate import share_of, view_of
from tasks.stages.arrays import Stored, dense_weight_of, put
from tasks.stages.two_sided import read_lengths, read_root, side_cost, side_inputs, side_settings


@dataclass(frozen=True)
class Upstream:
    """What layers are made of.

    Attributes:
        collected: Tap to its ``collect`` unit.
        decomposed: Stack to its ``decompose`` unit; empty where nothing is decomposed.
        allocation: The ``allocate`` unit, or what was learned, by layer, in its place.
        outputs: Layer to the unit of its output gradients; empty where nothing reads them.
    """

    collected: Mapping[str, Unit]
    decomposed: Mapping[str, Unit]
    allocation: Unit | Mapping[str, Unit]
    outputs: Mapping[str, Unit] = field(default_factory=dict)


def realise_groups(job: Job, upstream: Upstream) -> list[Group]:
    """One group per block, one unit per layer, for methods that need no compressed prefix."""
    compute = make_realise(job, upstream.allocation)
    return [
        Group(
            "realise",
            f"block {block}",
            [realise_unit(job, layer, upstream, {}) for layer in layers],
            compute,
        )
        for block in range(len(job.model.layout.blocks))
        if (layers := job.model.layout.of_block(block))
    ]


def realise_unit(
    job: Job, layer: LayerRef, upstream: Upstream, measured: Mapping[str, Unit]
) -> Unit:
    """The unit of one layer; a layer that stays dense stores nothing.

    Args:
        job: Gives the method.
        layer: The layer.
        upstream: What it is made of.
        measured: Tap to its ``measure`` unit, for methods that read the compressed prefix.
    """
    model, method = job.model, job.method
    stack = job.stack_of[layer.name]
    rows = rows_of(job.stack(layer), layer)
    settings = {
        "dtype": model.checkpoint.dtype(model.weight_key(layer.name)),
        "rows": [rows.start, rows.stop],
        "owner": job.owner(layer) == layer.name,
    }
    inputs, views, sources = {}, {}, {}
    if stack in upstream.decomposed:
        inputs["decomposition"] = upstream.decomposed[stack]
    if isinstance(upstream.allocation, Unit):
        views["share"] = (upstream.allocation, view_of(stack))
    else:
        inputs["learned"] = upstream.allocation[layer.name]
    form = job.stack(layer).form
    if form != PLAIN:
        settings["form"] = form
    if method.fit is not None:
        settings["fit"] = describe(method.fit)
    if method.entries is not None:
        settings["entries"] = describe(method.entries)
    if method.columns is not None:
        settings["columns"] = describe(method.columns)
    if method.coding is not None:
        settings["coding"] = describe(method.coding)
    if method.fitters or method.coding is not None:
        settings["transposed"] = layer.transposed
        sources["weight"] = model.stored[model.weight_key(layer.name)]
    if method.fitters:
        settings |= side_settings(job)
        inputs |= side_inputs(job, layer, upstream.outputs)
    if DENSE in method.moments:
        inputs["statistics"] = upstream.collected[layer.tap]
    if method.sequential:
        inputs["prefix"] = measured[layer.tap]
    return Unit(
        "realise",
        layer.name,
        settings=settings,
        code=[x for x in (method.decompose, *method.fitters, method.coding) if x is not None],
        sources=sources,
        inputs=inputs,
        views=views,
        cost=_cost(job, layer, form),
    )


def _cost(job: Job, layer: LayerRef, form: str) -> Cost:
    """What a layer is expected to take: its fit, what weighs its outputs, and its codes."""
    out, into, numbers = layer.out_features, layer.in_features, job.numbers(layer)
    small, coding = min(out, into), job.method.coding
    cost = Cost(
        memory=(8 if form == PLAIN else 40) * numbers,  # pivots are found in float64
        disk=4 * numbers,
    )
    if job.method.fit is not None and not job.method.rounds:
        cost = replace(cost, products={EXACT: 40.0 * small**2 * into})
    made, memory = [0.0], cost.memory + 8 * (3 * into**2 + 6 * layer.dense_cost)
    if job.method.entries is not None:
        # H is factored; the target is solved for by both triangles, a sweep goes through one.
        made.append(into**3 + (5 + 2 * job.method.entries.steps) * out * into**2)
    if job.method.columns is not None:
        # H is inverted; the target goes through that, and what is left of both through their rest.
        made.append(4.0 * into**3 + 6 * out * into**2)
    if len(made) > 1:  # of entries or of columns
        cost = replace(cost, products=add(cost.products, {EXACT: max(made)}), memory=memory)
    if job.method.fitters and not job.method.rounds:
        cost = side_cost(job, layer, 2 * small, cost)  # u there and back
    if coding is None:
        return cost
    # Numbers, their grids and both in the order of the sweep; all in float64.
    cost = replace(cost, memory=cost.memory + 80 * layer.dense_cost)
    if not coding.reads_inputs:
        return cost
    # H is factored and the factor inverted; the sweep goes through half of it. A product has
    # another such sweep, and each of its matrices is fitted to the other in H; in every turn.
    turns = coding.turns if job.method.corrects else 1
    sweeps = into**3 + turns * out * into**2
    if job.method.decompose is not None or job.method.corrects:
        sweeps += turns * (small**3 + 4 * out * into**2 + 6 * out * into * small)
    products = add(cost.products, {EXACT: float(sweeps)})
    return replace(cost, products=products, memory=cost.memory + 48 * into**2)


class Realise:
    """Cuts, fits or prunes the layers of a group, and stores them."""

    def __init__(self, job: Job, allocation: Unit | Mapping[str, Unit]) -> None:
        self.job = job
        self.allocation = allocation
        self.layers = {layer.name: layer for layer in job.model.layout.layers}

    def __call__(self, work: Work) -> None:
        """Computes the missing units of a group."""
        for done, unit in enumerate(work.missing):
            layer = self.layers[unit.name]
            packed = self._packed(work, unit, layer)
            with work.draft(unit) as draft:
                put(draft, packed)
            work.progress(done + 1, len(work.missing))

    def _packed(self, work: Work, unit: Unit, layer: LayerRef) -> Packed:
        """What the layer stores; nothing where it stays dense."""
        method, given = self.job.method, self._given(work, unit, layer)
        form = self.job.stack(layer).form
        dtype = self.job.model.checkpoint.torch_dtype(self.job.model.weight_key(layer.name))
        factors: LowRank | CodedParts | None
        if not isinstance(self.allocation, Unit):
            chosen = Chosen.unpack(Stored(work.artifact(unit.inputs["learned"])))
            share = Share(None, bits=FULL if method.coding is None else method.coding.bits)
            factors = realise_chosen(method.fit, given, chosen)
            if factors is None and share.bits != FULL:
                factors = of_whole(given.wide(given.weight()))
        else:
            share = share_of(work.artifact(self.allocation), self.job.stack_of[layer.name])
            fitters = method.fit, method.entries, method.columns
            fit, prune, keep = (self._weighed(work, unit, x) for x in fitters)
            factors = realise_share(method.decompose, fit, given, share, prune, keep)
        if factors is not None and method.coding is not None and share.bits != FULL:
            factors = code_share(method.coding, given, factors, share, form, dtype)
        own = self.job.owner(layer) == layer.name
        return pack_layer(factors, dtype, layer.dense_cost, own=own, form=form)

    def _weighed(self, work: Work, unit: Unit, fitter: Fitter | None) -> Fitter | None:
        return fitter

    def _given(self, work: Work, unit: Unit, layer: LayerRef) -> Given:
        kept = {role: Stored(work.artifact(up)) for role, up in unit.inputs.items()}
        return Given(
            layer,
            self.job.stack(layer),
            weight=lambda: dense_weight_of(self.job, layer),
            decomposition=kept.get("decomposition"),
            dense=InputStats.unpack(kept["statistics"]) if "statistics" in kept else None,
            behind=PrefixStats.unpack(kept["prefix"]) if "prefix" in kept else None,
            device=self.job.model.device,
        )


class _RealiseTwoSided(Realise):
    """Fits by what errors of outputs cost, too."""

    def _weighed(self, work: Work, unit: Unit, fitter: Fitter | None) -> Fitter | None:
        if fitter is None:
            return None
        of = (self.job, work, unit)
        return FitTwoSided(fitter, partial(read_root, *of), partial(read_lengths, *of))


def make_realise(job: Job, allocation: Unit | Mapping[str, Unit]) -> Realise:
    """What computes the units of a method: only a fit needs a layer's gradients again."""
    weighed = job.method.two_sided is not None and bool(job.method.fitters)
    return (_RealiseTwoSided if weighed else Realise)(job, allocation)


def read_weight(
    work: Work, job: Job, realised: Mapping[str, Unit], layer: LayerRef
) -> Tensor | None:
    """The weight (out, in) that a layer's parts stand for; None for one that stays dense."""
    record = Stored(work.artifact(realised[layer.name]))
    owner = job.owner(layer)
    shared = None if owner == layer.name else Stored(work.artifact(realised[owner]))
    return stored_weight(record, shared)
