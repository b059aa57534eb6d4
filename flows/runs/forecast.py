"""What a run or a sweep would do, unit by unit, and why; nothing is computed or written.

A unit is cached, or to run with the parts of its key that changed, or it waits for an upstream unit
that will run and is reused after all if that one's result turns out unchanged.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flows.runs.pipeline import Pipeline
from storage.artifact import Artifact
from storage.keys import ABSENT, Difference, differences, recipe_key
from storage.manifest import Manifest
from storage.store import Store
from tasks.engine.cost import Cost
from tasks.engine.dense_model import NOT_THERE
from tasks.engine.units import Unit, View
from tasks.engine.work import Group

KINDS = "settings sources inputs code"  # parts of a recipe, in the order they are told
MOST_WORDS = 4


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
        return [unit for units in self.groups(pipeline).values() for unit in units]

    def groups(self, pipeline: Pipeline) -> dict[Group, list[Planned]]:
        """As :meth:`plan`, by group."""
        found: dict[Group, list[Planned]] = {}
        for group in pipeline.groups:
            found[group] = []
            for unit in group.units:
                recipe = unit.recipe(self._digest, self._view)
                name = recipe_key(recipe)
                self._names[unit] = name
                planned = self._fate(unit, recipe, name)
                if unit is pipeline.folder and not pipeline.config.link:
                    planned = replace(planned, published=True)
                if name not in self._planned:
                    self._planned.add(name)
                    found[group].append(planned)
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
