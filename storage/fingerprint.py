"""Which code an entry point can reach inside some packages, and a short hash of each piece of it.

Purely static: the sources are read and parsed, nothing is imported, so it works without torch and
runs no side effects. Where the reach cannot be known exactly it errs towards more: a needless
recomputation rather than a stale hit.
"""

import functools
import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from storage.errors import StorageError
from storage.references import references
from storage.source import BODY, Module, Target, parse_module

Place = tuple[str, str]  # module, top-level name


def code_fingerprint(
    entry_points: Sequence[str], packages: Sequence[str], closed: Sequence[str] = ()
) -> dict[str, str]:
    """Return a hash of every top-level definition that the entry points reach inside packages.

    Reach follows names and attributes through imports (also inside functions), re-exports,
    decorators, base classes, annotations and `@registry.register` definitions. A module used
    otherwise than by attribute is reached whole. Comments, docstrings and formatting do not move a
    hash. A class that no reached code names (duck typing) has to be an entry point itself.

    Args:
        entry_points: dotted names of top-level definitions ("compress_core.metric.Plain").
        packages: the packages to stay in.
        closed: packages or modules inside them whose code decides no number: nothing of them is
            reached, nor through them.

    Returns:
        dotted name of a definition -> 16 hex digits, sorted by name.

    Raises:
        StorageError: a package or an entry point does not exist.
        SyntaxError: a module of the packages is not Python.
    """
    sources = tuple(file for package in packages for file in read_sources(package))
    open_to = tuple(file for file in sources if not _inside(file[0], closed))
    return dict(fingerprint_of(tuple(entry_points), open_to))


def _inside(module: str, places: Sequence[str]) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


Sources = tuple[tuple[str, bool, str, str], ...]  # (module, is package, text, path) of each file


def read_sources(package: str) -> Sources:
    """Read all modules of a package, found without importing anything."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise StorageError(f"there is no package {package!r} to take a code fingerprint of")
    found = []
    for folder in spec.submodule_search_locations:
        for path in sorted(Path(folder).rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            name = ".".join((package, *(parts[:-1] if is_package else parts)))
            found.append((name, is_package, path.read_text(encoding="utf-8"), str(path)))
    return tuple(found)


@functools.lru_cache(maxsize=256)
def fingerprint_of(entry_points: tuple[str, ...], sources: Sources) -> tuple[tuple[str, str], ...]:
    """Return (dotted name, hash) of what the entry points reach in sources given as text."""
    reach = _Reach(_Package({name: parse_module(name, *rest) for name, *rest in sources}))
    for entry_point in entry_points:
        reach.enter(entry_point)
    reach.finish()
    found = {f"{module}.{name}": reach.package[module].hashes[name] for module, name in reach.seen}
    return tuple(sorted(found.items()))


class _Package:
    """The parsed modules of the packages and what names in them mean."""

    def __init__(self, modules: dict[str, Module]) -> None:
        self._modules = modules

    def __getitem__(self, name: str) -> Module:
        return self._modules[name]

    def __contains__(self, name: str) -> bool:
        return name in self._modules

    def __iter__(self) -> Iterator[Module]:
        return iter(self._modules.values())

    def member(
        self, module: Module, chain: tuple[str, ...], passed: frozenset[Place]
    ) -> Iterator[Place]:
        """Yield the definitions meant by an attribute chain of a module; all of them if empty.

        Python's order: what the module binds, then its submodules. `passed` breaks circles.
        """
        if not chain:
            yield from self.whole(module, passed)
            return
        name, rest = chain[0], chain[1:]
        if (module.name, name) in passed:
            return
        passed = passed | {(module.name, name)}
        bound = name in module.definitions or name in module.imports
        if name in module.definitions:
            yield module.name, name
        if name in module.imports:
            yield from self.follow(module.imports[name], rest, passed)
        elif not bound and f"{module.name}.{name}" in self._modules:
            yield from self.member(self._modules[f"{module.name}.{name}"], rest, passed)
        elif not bound:
            for star in module.stars:
                if star in self._modules:
                    yield from self.member(self._modules[star], chain, passed)
            if "__getattr__" in module.definitions:
                yield module.name, "__getattr__"

    def whole(self, module: Module, passed: frozenset[Place]) -> Iterator[Place]:
        """Yield every definition of a module, and what it imports from the package."""
        for name in module.definitions:
            yield module.name, name
        for name in module.imports:
            yield from self.member(module, (name,), passed)

    def follow(
        self, target: Target, rest: tuple[str, ...], passed: frozenset[Place] = frozenset()
    ) -> Iterator[Place]:
        """Yield the definitions meant by the attributes `rest` of an imported name, if any."""
        if target.module in self._modules:
            chain = (target.name, *rest) if target.name else rest
            yield from self.member(self._modules[target.module], chain, passed)


class _Reach:
    """The closure of references, as far as it has been walked."""

    def __init__(self, package: _Package) -> None:
        self.package = package
        self.seen: dict[Place, None] = {}
        self._ahead: list[Place] = []
        self._executed: set[str] = set()
        self._joining: dict[Place, list[Place]] = {}
        for module in package:
            for chain, name in module.registrations:
                for registry in package.member(module, chain, frozenset()):
                    self._joining.setdefault(registry, []).append((module.name, name))

    def enter(self, entry_point: str) -> None:
        """Start from a dotted name: the longest part that is a module, then one name in it.

        Raises:
            StorageError: there is no such definition.
        """
        module_name, _, name = entry_point.rpartition(".")
        if module_name not in self.package:
            raise StorageError(
                f"entry point {entry_point!r}: {module_name!r} is no module of the packages; "
                "name a top-level definition, such as package.module.function"
            )
        places = list(self.package.member(self.package[module_name], (name,), frozenset()))
        if not places or entry_point in self.package:
            known = ", ".join(sorted(self.package[module_name].definitions)) or "nothing"
            raise StorageError(
                f"entry point {entry_point!r}: {name!r} is not defined at the top level of "
                f"{module_name}, which defines {known}"
            )
        self._reach(places)

    def finish(self) -> None:
        """Follow every reference until nothing new is reached."""
        while self._ahead:
            place = self._ahead.pop()
            module = self.package[place[0]]
            self._execute(module.name)
            self._reach(self._joining.get(place, ()))
            for chain, imported in references(module, place[1]):
                if imported is None:
                    self._reach(self.package.member(module, chain, frozenset()))
                else:
                    self._reach(self.package.follow(imported, chain[1:]))

    def _reach(self, places: Iterable[Place]) -> None:
        for place in places:
            if place not in self.seen:
                self.seen[place] = None
                self._ahead.append(place)

    def _execute(self, name: str) -> None:
        """Reach the bare statements of an imported module, its parents and what it imports."""
        if name not in self.package or name in self._executed:
            return
        self._executed.add(name)
        module = self.package[name]
        self._execute(name.rpartition(".")[0])
        if module.is_package:
            return  # what an `__init__.py` does besides naming things decides no number
        if BODY in module.definitions:
            self._reach([(name, BODY)])
        for target in module.imports.values():
            self._execute(target.module)
            self._execute(f"{target.module}.{target.name}")
        for star in module.stars:
            self._execute(star)
