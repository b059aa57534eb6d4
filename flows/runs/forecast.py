"""What a run or a sweep would do, unit by unit, and why; nothing is computed or written.

A unit is cached, or to run with the parts of its key that changed, or it waits for an upstream unit
that will run and is reused after all if that one's result turns out unchanged.
"""

import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flows.runs.pipeline import Pipeline
from flows.runs.workspace import Workspace
from storage.keys import ABSENT, Difference, differences, recipe_key
from storage.manifest import Manifest
from storage.store import Store
from tasks.engine.units import Unit, View

KINDS = "settings sources inputs code"  # parts of a recipe, in the order they are told
MOST_WORDS = 4


@dataclass(frozen=True)
class Planned:
    """The fate of one unit: ``state`` is "cached", "run" or "waits"; ``why`` says what changed."""

    stage: str
    unit: str
    state: str
    why: str
    key: str | None
    operations: float
    memory: int
    disk: int


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
                if name not in self._planned:
                    self._planned.add(name)
                    found.append(planned)
        return found

    def _fate(self, unit: Unit, recipe: dict[str, Any], name: str) -> Planned:
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
        cost = unit.cost
        return Planned(
            unit.stage, unit.name, state, reason, key, cost.operations, cost.memory, cost.disk
        )

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
    """What the units that may run will take: seconds, peak bytes of memory, bytes of disk."""

    seconds: float
    memory: int
    disk: int


def estimate(planned: Sequence[Planned], workspace: Workspace) -> Estimate:
    """Counts operations, and times a matrix product here to turn them into seconds."""
    todo = [unit for unit in planned if unit.state != "cached"]
    hidden = _hidden_bytes(workspace) if any(u.stage == "collect" for u in todo) else 0
    rate = _operations_per_second(workspace.model.device) if todo else 1.0
    return Estimate(
        seconds=sum(unit.operations for unit in todo) / rate + 0.02 * len(todo),
        memory=max((unit.memory for unit in todo), default=0) + hidden,
        disk=sum(unit.disk for unit in todo),
    )


def _hidden_bytes(workspace: Workspace) -> int:
    """Bytes of the hidden states of all calibration windows, of which one set is held."""
    layers = workspace.model.layout.layers
    width = min(layer.in_features for layer in layers)
    return 4 * workspace.settings.samples * workspace.length * width


def _operations_per_second(device: str, size: int = 768) -> float:
    matrix = torch.rand(size, size, dtype=torch.float64, device=device)
    float((matrix @ matrix)[0, 0])  # the first product sets threads and libraries up
    started = time.perf_counter()
    float((matrix @ matrix)[0, 0])
    return 2.0 * size**3 / (time.perf_counter() - started)
