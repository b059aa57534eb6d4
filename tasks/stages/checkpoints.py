"""States of a training in the store, so that a run that was stopped goes on from the last one."""

from collections.abc import Mapping
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from storage.errors import ArtifactMissingError
from storage.keys import recipe_key
from storage.store import Store
from tasks.engine.session import Session
from tasks.stages.scratch import SCRATCH, discard

PLACES = (0, 1)  # of checkpoints
STATE = "state.safetensors"  # one file: an array each takes longer than small models take to train


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
        recipe, name = self._recipe(place), f"training at step {step}"
        key = recipe_key(recipe)
        with self.store.draft(key=key, stage=SCRATCH, unit=name, recipe=recipe, inputs={}) as draft:
            whole = {part: tensor.detach().cpu().contiguous() for part, tensor in tensors.items()}
            save_file(whole, draft.add_file(STATE))
            draft.attrs["step"] = step
        self._discard(self._last)
        self._last = place

    def clear(self) -> None:
        """Removes what is left when the training is done."""
        for place in PLACES:
            self._discard(place)

    def _read(self, place: int) -> dict[str, Tensor] | None:
        key = recipe_key(self._recipe(place))
        if self.store.find(key, SCRATCH) is None:
            return None
        try:
            return dict(load_file(self.store.open(key, SCRATCH).file(STATE)))
        except (ArtifactMissingError, FileNotFoundError):  # another process finished with it
            return None

    def _step(self, place: int) -> int:
        found = self.store.find(recipe_key(self._recipe(place)), SCRATCH)
        return 0 if found is None else int(found.attrs.get("step", 0))

    def _discard(self, place: int) -> None:
        discard(self.store, self._recipe(place))

    def _recipe(self, place: int) -> dict[str, Any]:
        settings = {"training of": self.key, "place": place}
        return {"stage": SCRATCH, "settings": settings, "sources": {}, "inputs": {}, "code": {}}
