"""Where transformers copies a folder's own code: into a test's folder, not the user's cache."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

PACKAGE = "transformers_modules"


@contextmanager
def code_cache_at(folder: Path) -> Iterator[None]:
    """A cache of its own for a while; modules out of another one are not taken for its own."""
    path, before = list(sys.path), _taken_out()
    sys.path[:] = [place for place in path if not Path(place, PACKAGE).is_dir()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder))
        yield
    _taken_out()
    sys.modules.update(before)
    sys.path[:] = path


def _taken_out() -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name.partition(".")[0] == PACKAGE]
    return {name: sys.modules.pop(name) for name in names}
