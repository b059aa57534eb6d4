"""Units of work and what decides whether one has to be done: its recipe, and from it its key.

A unit is the smallest thing the store keeps (a tap's statistics, a layer's factors, a metric). A
group is what one Prefect task covers (a block's units). Groups run in order; a unit's inputs are
units of earlier groups, so its key is known, from the contents of those, before it runs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from storage.artifact import Artifact
from tasks.engine.code import fingerprint
from tasks.engine.cost import Cost

View = Callable[[Artifact], Any]


class Unit:
    """One thing to compute and keep.

    Args:
        stage: Name of its stage.
        name: Layer, tap or text it is about; shown to people, not part of the key.
        settings: JSON values that decide its numbers.
        code: What computes it besides its group's ``compute``: functions, classes or instances of
            them; everything they reach counts.
        sources: Role to content digest of what is read from outside the store.
        inputs: Role to upstream unit, whose content digest enters the key.
        views: Role to upstream unit and the part of it that matters, which enters the key instead.
        cost: What it is expected to take.
    """

    def __init__(
        self,
        stage: str,
        name: str,
        *,
        settings: Mapping[str, Any],
        code: Sequence[Any] = (),
        sources: Mapping[str, str] | None = None,
        inputs: Mapping[str, "Unit"] | None = None,
        views: Mapping[str, tuple["Unit", View]] | None = None,
        cost: Cost | None = None,
    ) -> None:
        self.stage = stage
        self.name = name
        self.settings = dict(settings)
        self.code = tuple(code)
        self.sources = dict(sources or {})
        self.inputs = dict(inputs or {})
        self.views = dict(views or {})
        self.cost = cost or Cost()

    @property
    def upstream(self) -> dict[str, "Unit"]:
        """Role to unit, for everything that this one reads."""
        return self.inputs | {role: unit for role, (unit, _) in self.views.items()}

    def recipe(self, digest: Callable[["Unit"], str], view: Callable[["Unit", View], Any]) -> dict:
        """Everything that decides its numbers, as JSON."""
        return {
            "stage": self.stage,
            "settings": self.settings,
            "code": fingerprint(self.code),
            "sources": self.sources,
            "inputs": {role: digest(unit) for role, unit in self.inputs.items()}
            | {role: view(unit, part) for role, (unit, part) in self.views.items()},
        }


@dataclass(frozen=True)
class Outcome:
    """What became of one unit.

    Attributes:
        stage: Its stage.
        unit: Its name.
        key: Its key.
        state: Whether it was ``cached`` or ``computed``.
        seconds: How long that took now.
        cpu_seconds: What computing it took, whenever that was; None where it is not on record.
    """

    stage: str
    unit: str
    key: str
    state: str
    seconds: float
    cpu_seconds: float | None = None
