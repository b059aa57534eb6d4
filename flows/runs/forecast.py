"""What a run or a sweep would do, unit by unit, and why; nothing is computed or written.

A unit is cached, or to run with the parts of its key that changed, or it waits for an upstream unit
that will run and is reused after all if that one's result turns out unchanged.
"""

import shutil
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from flows.runs.machine import Machine, known_machine
from flows.runs.pipeline import Pipeline
from flows.runs.workspace import LIBRARIES, Workspace, allowed_for_one
from storage.artifact import Artifact
from storage.keys import ABSENT, Difference, differences, recipe_key
from storage.manifest import Manifest
from storage.store import Store
from tasks.engine.cost import MODEL, Cost
from tasks.engine.dense_model import NOT_THERE
from tasks.engine.free_memory import free_memory
from tasks.engine.units import Unit, View

KINDS = "settings sources inputs code"  # parts of a recipe, in the order they are told
MOST_WORDS = 4
UNIT_SECONDS = 0.02  # of a unit's key, its artifact and its place in the flow


@dataclass(frozen=True)
class Planned:
    """The fate of one unit: ``state`` is "cached", "run" or "waits"; ``why`` says what changed.

    ``published``: whether the model folder of a run is a copy of what it makes.
    """

    stage: str
    unit: str
    state: str
    why: str
    key: str | None
    cost: Cost
    published: bool = False


class Planner:
    """Works out the fate of units in order; units that several runs share are planned once.

    Args:
        store: Where artifacts are; only looked at.
        refresh: Stages that are asked to be computed again.
    """

    def __init__(self, store: Store, refresh: Sequence[str] = ()) -> None:
        self.store = store
        self.refresh = frozenset(refresh)
        self._done: dict[Unit, Manifest] = {}
        self._names: dict[Unit, str] = {}  # what stands for a unit whose content is not known yet
        self._planned: set[str] = set()

    def plan(self, pipeline: Pipeline) -> list[Planned]:
        """The fates of all units of a run that no earlier run of the same plan has in common."""
        found = []
        for group in pipeline.groups:
            for unit in group.units:
                recipe = unit.recipe(self._digest, self._view)
                name = recipe_key(recipe)
                self._names[unit] = name
                planned = self._fate(unit, recipe, name)
                if unit is pipeline.folder and not pipeline.config.link:
                    planned = replace(planned, published=True)
                if name not in self._planned:
                    self._planned.add(name)
                    found.append(planned)
        return found

    def artifact(self, unit: Unit) -> Artifact | None:
        """What a planned unit left in the store; None where it will run."""
        known = self._done.get(unit)
        return None if known is None else self.store.open(known.key, unit.stage)

    def _fate(self, unit: Unit, recipe: dict[str, Any], name: str) -> Planned:
        gone = [role for role, digest in unit.sources.items() if digest.startswith(NOT_THERE)]
        if gone:
            return self._planned_as(unit, "run", f"not there: {', '.join(gone)}", None)
        candidates = self.store.candidates(unit.stage, unit.name)
        waiting = {role: up for role, up in unit.upstream.items() if up not in self._done}
        if waiting:
            changes = nearest_changes(recipe, candidates, {f"inputs.{role}" for role in waiting})
            if changes == []:
                stages = ", ".join(sorted({up.stage for up in waiting.values()}))
                reason = f"{stages} runs; reused if that result is unchanged"
                return self._planned_as(unit, "waits", reason, None)
            return self._planned_as(unit, "run", say(changes), None)
        manifest = self.store.peek(name, unit.stage)
        if unit.stage in self.refresh:
            return self._planned_as(unit, "run", "--refresh", name)
        if manifest is not None:
            self._done[unit] = manifest
            return self._planned_as(unit, "cached", "", name)
        if any(candidate.key == name for candidate in candidates):
            return self._planned_as(unit, "run", "its artifact is damaged or incomplete", name)
        return self._planned_as(unit, "run", say(nearest_changes(recipe, candidates)), name)

    def _planned_as(self, unit: Unit, state: str, reason: str, key: str | None) -> Planned:
        return Planned(unit.stage, unit.name, state, reason, key, unit.cost)

    def _digest(self, unit: Unit) -> str:
        if unit in self._done:
            return self._done[unit].digest
        return f"pending {self._names[unit]}"

    def _view(self, unit: Unit, part: View) -> Any:
        if unit in self._done:
            return part(self.store.open(self._done[unit].key, unit.stage))
        return f"pending {self._names[unit]}"


def nearest_changes(
    recipe: dict[str, Any], candidates: Iterable[Manifest], unknown: Collection[str] = ()
) -> list[Difference] | None:
    """What changed since the nearest earlier artifact of the same unit; None if there is none.

    Args:
        recipe: The unit's recipe.
        candidates: Its earlier artifacts.
        unknown: Paths in the recipe that cannot be compared yet.
    """
    found = (
        [change for change in differences(earlier.recipe, recipe) if change.path not in unknown]
        for earlier in candidates
    )
    return min(found, key=len, default=None)


def say(changes: Iterable[Difference] | None) -> str:
    """The changes in words, each once, settings first; of many only the first few."""
    if changes is None:
        return "not computed before"
    ordered = sorted(changes, key=lambda change: KINDS.find(change.path.partition(".")[0]))
    words = list(dict.fromkeys(describe_change(change) for change in ordered))
    if len(words) > MOST_WORDS + 1:
        words[MOST_WORDS:] = [f"and {len(words) - MOST_WORDS} more"]
    return ", ".join(words)


def describe_change(change: Difference) -> str:
    """One changed part of a recipe in words: "seed 0 → 1", "code of compress_core.metric"."""
    kind, _, rest = change.path.partition(".")
    if kind == "code":
        return f"code of {rest.rpartition('.')[0]}"
    if kind == "settings" and ABSENT not in (change.old, change.new):
        return f"{rest} {_short(change.old)} → {_short(change.new)}"
    return rest


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:20]}…"


@dataclass(frozen=True)
class Estimate:
    """What the units that may run will take, on this machine when it does nothing else.

    Attributes:
        seconds: In all, the start of the command aside.
        stages: Stage to its part of them.
        memory: Peak bytes on the device, the libraries aside.
        largest: What takes them.
        disk: Bytes that are added to the data directory: to the store, and copies of the models.
        models: Bytes of each compressed model's folder, ascending.
        free_memory: Bytes that the device still has.
        free_disk: Bytes that the data directory's disk still has.
        computes_in: Dtype of the models' products.
        not_counted: What may run too and has no estimate.
        allowed_memory: Bytes that --memory allows; None without it.
    """

    seconds: float
    stages: dict[str, float]
    memory: int
    largest: Planned | None
    disk: int
    models: list[int]
    free_memory: int
    free_disk: int
    computes_in: str
    not_counted: list[str]
    allowed_memory: int | None = None

    @property
    def shortages(self) -> list[str]:
        """What will not fit, a sentence each."""
        found = [] if self.refusal is None else [self.refusal]
        for what, needed, free in (
            ("memory", self.memory + LIBRARIES, self.free_memory),
            ("disk", self.disk, self.free_disk),
        ):
            if needed > free:
                found.append(
                    f"{what} will not do: {needed / 1e6:,.0f} MB needed, {free / 1e6:,.0f} MB free"
                )
        return found

    @property
    def refusal(self) -> str | None:
        """Why a run is refused: what needs more than --memory allows, and what would help."""
        return refusal(self.largest, self.memory, self.allowed_memory)


def refusal(largest: Planned | None, needed: int, allowed: int | None) -> str | None:
    """Why a run is refused, if it is.

    Args:
        largest: What takes the most memory.
        needed: Its bytes, the libraries aside.
        allowed: Bytes that --memory allows, if any.
    """
    if allowed is None or largest is None or needed + LIBRARIES <= allowed:
        return None
    if largest.cost.whole:
        why = (
            "it holds the whole model, which cannot go block by block: give more, or leave out "
            "what asks for it (an allocator or training that needs gradients, --tasks)"
        )
    else:
        why = "give more, or a smaller --batch-size, --length or --samples"
    return (
        f"--memory {allowed / 1e6:,.0f} MB will not do: {largest.stage}, {largest.unit} needs "
        f"about {(needed + LIBRARIES) / 1e6:,.0f} MB, {LIBRARIES / 1e6:,.0f} of them for "
        f"libraries; {why}"
    )


def largest_of(planned: Sequence[Planned], computes_in: str) -> tuple[Planned | None, int]:
    """What takes the most memory of all that may run, and its bytes."""
    todo = [unit for unit in planned if unit.state != "cached"]
    largest = max(todo, key=lambda unit: memory(unit.cost, computes_in), default=None)
    return largest, 0 if largest is None else memory(largest.cost, computes_in)


def estimate(planned: Sequence[Planned], workspace: Workspace) -> Estimate:
    """Work by kind, divided by what this machine does of each in a second."""
    todo = [unit for unit in planned if unit.state != "cached"]
    device, home = workspace.model.device, workspace.settings.home.expanduser()
    computes_in = workspace.model.compute_dtype
    stages: dict[str, float] = {}
    if todo:
        wanted = {computes_in, *(kind for unit in todo for kind in unit.cost.products)}
        machine = known_machine(home, device, sorted(wanted - {MODEL}))
        for unit in todo:
            took = seconds(unit.cost, machine, computes_in)
            stages[unit.stage] = stages.get(unit.stage, 0.0) + took
    largest, most = largest_of(planned, computes_in)
    return Estimate(
        seconds=sum(stages.values()),
        stages=stages,
        memory=most,
        largest=largest,
        disk=sum(unit.cost.disk * (2 if unit.published else 1) for unit in todo),
        models=sorted({unit.cost.disk for unit in planned if unit.stage == "materialise"}),
        free_memory=free_memory(device),
        free_disk=shutil.disk_usage(home).free,
        computes_in=computes_in,
        not_counted=_not_counted(todo),
        allowed_memory=allowed_for_one(workspace.settings),
    )


def seconds(cost: Cost, machine: Machine, computes_in: str) -> float:
    """How long a unit takes; what it stores is read once, too."""
    products = sum(
        count / machine.products[computes_in if kind == MODEL else kind]
        for kind, count in cost.products.items()
    )
    disk = cost.disk / machine.write + cost.disk / machine.read
    return (
        UNIT_SECONDS + products + cost.eigen / machine.eigen + cost.logits / machine.logits + disk
    )


def memory(cost: Cost, computes_in: str) -> int:
    """Peak bytes of a unit."""
    return cost.memory + cost.held * getattr(torch, computes_in).itemsize


def _not_counted(todo: Sequence[Planned]) -> list[str]:
    """Evaluations of unknown length."""
    return [
        unit.unit for unit in todo if unit.stage == "evaluate" and not unit.cost.products.get(MODEL)
    ]
