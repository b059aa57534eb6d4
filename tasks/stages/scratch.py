"""Hidden states between blocks: kept so that an interrupted run goes on, removed when it has."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor

from storage.errors import ArtifactMissingError
from storage.keys import recipe_key
from storage.store import Store
from tasks.stages.arrays import get_tensor, put_tensor

SCRATCH = "scratch"


def keep(store: Store, recipe: Mapping[str, Any], name: str, tensors: Mapping[str, Tensor]) -> None:
    """Keeps tensors under a recipe, unless they are there already."""
    key = recipe_key(recipe)
    if store.find(key, SCRATCH) is None:
        with store.draft(key=key, stage=SCRATCH, unit=name, recipe=recipe, inputs={}) as draft:
            for array, tensor in tensors.items():
                put_tensor(draft, array, tensor)


def load(store: Store, recipe: Mapping[str, Any], *names: str) -> list[Tensor] | None:
    """Copies of tensors kept under a recipe, or None where there are none any more.

    Another process may finish with them and remove them while they are read.
    """
    key = recipe_key(recipe)
    if store.find(key, SCRATCH) is None:
        return None
    try:
        artifact = store.open(key, SCRATCH)
        return [get_tensor(artifact, name).clone() for name in names]
    except ArtifactMissingError:  # another process finished with it in the meantime
        return None


def discard(store: Store, recipe: Mapping[str, Any]) -> None:
    """Removes what is kept under a recipe, if anything is."""
    with suppress(ArtifactMissingError):  # it was never needed, or another process removed it
        store.remove(recipe_key(recipe))
