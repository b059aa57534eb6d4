"""Every line that runs while a unit is computed is in its key: watched, not believed.

A run is watched function by function. Whatever of the core or of the tasks runs while a group
computes must be part of the code of every unit that the group computes; the engine, which is closed
to fingerprints, is left out. And what is part of the code moves the key: the same fingerprint is
taken of each of those files with the numbers in it changed.
"""

import ast
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

from compress_core.methods import METHODS
from storage.fingerprint import fingerprint_of, read_sources
from tasks.engine.code import CLOSED, PACKAGES, fingerprint, name_of
from tasks.engine.session import Session
from tasks.engine.units import Unit
from tasks.engine.work import Work
from tests.learning import few_turns, shortened
from tests.pipeline import pico

RUNS: dict[str, dict[str, Any]] = {
    **{few_turns(shortened(name)): {} for name in METHODS},
    "svd_llm:update=u": {},
    "svd_llm@hull": {},
    "svd_llm@fisher": {},
    "svd_llm@fisher:metric=two_sided": {},
    "duo_svd@uniform:metric=two_sided": {},
    "saes_svd:prefix=block:metric=two_sided": {},
    "cap:reading=printed:iterations=3": {},
    "cap:policy=group:steps=3:refit=anchor": {},
    "cap:policy=none:scale=none": {},
    "cap:steps=3:refit=prefix": {},
    "dobi_svd:steps=2:remap=true": {},
    "svd recovered": {"method": "svd", "recover": "factors", "recover_steps": 2},
    "svd by blocks": {"method": "svd", "recover": "blocks", "recover_steps": 2},
    "svd updated": {"method": "svd", "recover": "lora", "recover_steps": 2},
}


class Watch:
    """Notes the top-level definitions of our packages that run."""

    def __init__(self) -> None:
        self.ran: set[str] = set()
        self._known: dict[CodeType, str | None] = {}

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            code = frame.f_code
            if code not in self._known:
                self._known[code] = self._name(code)
            if name := self._known[code]:
                self.ran.add(name)

    @staticmethod
    def _name(code: CodeType) -> str | None:
        path = Path(code.co_filename)
        if not path.is_relative_to(pico.ROOT):
            return None
        parts = path.relative_to(pico.ROOT).with_suffix("").parts
        module = ".".join(parts)
        top = code.co_qualname.partition(".")[0]
        inside = parts[0] in PACKAGES and not module.startswith(CLOSED) and not top.startswith("<")
        return f"{module}.{top}" if inside else None


@contextmanager
def watched() -> Iterator[Watch]:
    watch = Watch()
    sys.setprofile(watch)
    try:
        yield watch
    finally:
        sys.setprofile(None)


def computed(settings: dict[str, Any]) -> list[tuple[Unit, set[str]]]:
    """Every unit that a run computes, with what ran while it was."""
    pipeline, store, _ = pico.build(settings)
    session = Session(store)
    found: list[tuple[Unit, set[str]]] = []
    for group in pipeline.groups:
        compute = group.compute

        def observed(work: Work, compute: Any = compute) -> None:
            with watched() as watch:
                compute(work)
            found.extend((unit, watch.ran) for unit in work.missing)

        group.compute = observed
        session.run(group)
    return found


Found = list[tuple[Unit, set[str]]]


@pytest.fixture(scope="module")
def ran_in(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Found]:
    """What ran for each unit that a run was the first to compute; all runs have one home."""
    folder, known = tmp_path_factory.mktemp("reach"), dict[str, Found]()
    inputs = pico.make_inputs(folder, config=partial(pico.llama, blocks=2))
    home = folder / "home"

    def find(run: str) -> Found:
        if run not in known:
            known[run] = computed(inputs.settings(home, **({"method": run} | RUNS[run])))
        return known[run]

    return find


@pytest.mark.parametrize("run", RUNS)
def test_what_runs_while_a_unit_is_computed_is_in_its_key(
    run: str, ran_in: Callable[[str], Found]
) -> None:
    missing: dict[str, set[str]] = {}
    for unit, ran in ran_in(run):
        known = fingerprint(unit.code)
        if left := {name for name in ran if name not in known}:
            missing.setdefault(unit.stage, set()).update(left)
    assert not missing, "\n".join(f"{s}: {sorted(n)}" for s, n in missing.items())


class _Changed(ast.NodeTransformer):
    """Adds one to every number in some top-level definitions."""

    def __init__(self) -> None:
        self.count = 0

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        if type(node.value) in (int, float):
            self.count += 1
            return ast.Constant(node.value + 1)  # type: ignore[operator]
        return node


def with_numbers_changed(text: str, names: set[str]) -> str | None:
    """A module whose definitions of these names have other numbers; None where they have none."""
    tree, changed = ast.parse(text), _Changed()
    for statement in tree.body:
        if getattr(statement, "name", None) in names:
            changed.visit(statement)
    return ast.unparse(tree) if changed.count else None


def test_other_numbers_in_a_file_that_computes_are_another_key(
    ran_in: Callable[[str], Found],
) -> None:
    sources = [file for package in PACKAGES for file in read_sources(package)]
    kinds: dict[tuple[str, tuple[str, ...]], set[str]] = {}
    found = [
        pair for run in ("svd", "svd_llm@hull", "ada_svd", "sparsegpt") for pair in ran_in(run)
    ]
    for unit, ran in found:
        names = tuple(sorted({name_of(part) for part in unit.code}))
        kinds.setdefault((unit.stage, names), set()).update(ran)
    files = 0
    for (stage, names), ran in kinds.items():
        before = fingerprint_of(names, _open(sources))
        for place, (module, is_package, text, path) in enumerate(sources):
            own = {name.rpartition(".")[2] for name in ran if name.rpartition(".")[0] == module}
            other = with_numbers_changed(text, own)
            if other is not None:
                files += 1
                changed = [*sources]
                changed[place] = (module, is_package, other, path)
                assert fingerprint_of(names, _open(changed)) != before, (stage, module)
    assert files > 20


def _open(sources: Any) -> Any:
    """What is not closed to fingerprints."""
    return tuple(file for file in sources if not file[0].startswith(CLOSED))
