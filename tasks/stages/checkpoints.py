"""States of a training in the store, so that a run that was stopped goes on from the last one."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from storage.keys import recipe_key
from storage.store import Store
from tasks.engine.session import Session
from tasks.stages.scratch import SCRATCH, discard, keep, load, names_of

PLACES = (0, 1)  # of checkpoints


def clear_checkpoints(session: Session, recipe: Mapping[str, Any]) -> None:
    """What a training's group does when all its units are there.

    A process may have been killed between the end of a training and the removal of its states.
    """
    StoredCheckpoints(session.store, recipe_key(recipe)).clear()


class StoredCheckpoints:
    """States of a training in the store: only the latest is kept, and none when it is done.

    A state goes where the one before the last was, so that one is whole whenever the process dies.

    Args:
        store: Where artifacts are kept.
        key: Of a unit that the training makes; its states are found by it.
    """

    def __init__(self, store: Store, key: str) -> None:
        self.store = store
        self.key = key
        self._last = 1

    def load(self) -> dict[str, Tensor] | None:
        """The latest state, or None at the beginning."""
        for place in sorted(PLACES, key=self._step, reverse=True):
            found = self._read(place)
            if found is not None:
                self._last = place
                return found
        return None

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Keeps the state after ``step`` steps, and then removes the one before."""
        place = 1 - self._last
        self._discard(place)
        keep(self.store, self._recipe(place), f"training at step {step}", tensors)
        self._discard(self._last)
        self._last = place

    def clear(self) -> None:
        """Removes what is left when the training is done."""
        for place in PLACES:
            self._discard(place)

    def _read(self, place: int) -> dict[str, Tensor] | None:
        names = names_of(self.store, self._recipe(place))
        found = None if names is None else load(self.store, self._recipe(place), *names)
        return None if names is None or found is None else dict(zip(names, found, strict=True))

    def _step(self, place: int) -> int:
        found = load(self.store, self._recipe(place), "step")
        return 0 if found is None else int(found[0])

    def _discard(self, place: int) -> None:
        discard(self.store, self._recipe(place))

    def _recipe(self, place: int) -> dict[str, Any]:
        settings = {"training of": self.key, "place": place}
        return {"stage": SCRATCH, "settings": settings, "sources": {}, "inputs": {}, "code": {}}
