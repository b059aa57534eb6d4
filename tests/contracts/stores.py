"""A store with something in it, for the tests of faults and of damage."""

from pathlib import Path

import numpy as np

from storage.keys import recipe_key
from storage.manifest import Manifest
from storage.store import Store


def make(store: Store, seed: int = 0) -> Manifest:
    recipe = {"seed": seed}
    with store.draft(
        key=recipe_key(recipe), stage="weigh", unit="layer 3", recipe=recipe, inputs={}
    ) as draft:
        draft.put("u", np.random.default_rng(seed).standard_normal((600, 4)))
        draft.add_file("note.txt").write_text("note")
    return draft.manifest


def drafts(store: Store) -> list[Path]:
    return list(store.layout.tmp.iterdir())


def folder(store: Store, manifest: Manifest) -> Path:
    return store.layout.artifact(manifest.stage, manifest.key)
