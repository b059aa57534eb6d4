"""One module's source, cut into its top-level definitions and imports; parsed, never imported.

Also the hash of a definition: of its syntax tree, without comments, docstrings and positions.
"""

import ast
import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

BODY = "<body>"
"""Pseudo-definition: statements that run when a module is imported and bind no name."""

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Target:
    """What an imported name stands for.

    Attributes:
        module: dotted name of a module.
        name: name inside it; None for the module itself.
    """

    module: str
    name: str | None = None


@dataclass(frozen=True)
class Module:
    """A parsed module.

    Attributes:
        name: dotted name.
        is_package: whether it is an `__init__.py`.
        definitions: top-level name -> the statements that bind or fill it.
        imports: top-level name -> what it stands for.
        stars: modules of which everything is imported.
        registrations: (chain of the registry, name of the definition that joins it) for each
            `@registry.register`; a chain is a name and the attributes taken from it.
        referred: top-level name -> what `references` found in it, once it has looked.
    """

    name: str
    is_package: bool
    definitions: dict[str, list[ast.stmt]] = field(default_factory=dict)
    imports: dict[str, Target] = field(default_factory=dict)
    stars: list[str] = field(default_factory=list)
    registrations: list[tuple[tuple[str, ...], str]] = field(default_factory=list)
    referred: dict[str, list[tuple[tuple[str, ...], Target | None]]] = field(default_factory=dict)

    @functools.cached_property
    def hashes(self) -> dict[str, str]:
        """Top-level name -> 16 hex digits that stand for what its statements do."""
        return {name: _hash(statements) for name, statements in self.definitions.items()}

    def targets(self, statement: ast.stmt) -> Iterator[tuple[str, Target]]:
        """Yield (bound name, target) of an import statement; a star is bound as "*"."""
        if isinstance(statement, ast.Import):
            for alias in statement.names:
                if alias.asname:
                    yield alias.asname, Target(alias.name)
                else:
                    top = alias.name.partition(".")[0]
                    yield top, Target(top)
        elif isinstance(statement, ast.ImportFrom):
            origin = self._origin(statement)
            for alias in statement.names:
                yield alias.asname or alias.name, Target(origin, alias.name)

    def _origin(self, statement: ast.ImportFrom) -> str:
        """Return the absolute name of the module after `from`."""
        if not statement.level:
            return statement.module or ""
        parts = self.name.split(".")
        base = parts[: len(parts) - statement.level + self.is_package]
        return ".".join([*base, *([statement.module] if statement.module else [])])


@functools.lru_cache(maxsize=512)
def parse_module(name: str, is_package: bool, text: str, path: str) -> Module:
    """Parse a module.

    Args:
        name: its dotted name.
        is_package: whether the text is an `__init__.py`.
        text: its source.
        path: where it came from, for messages.

    Raises:
        SyntaxError: the text is not Python.
    """
    module = Module(name, is_package)
    for statement in ast.parse(text, path).body:
        _take(module, statement)
    for name in module.definitions.keys() & module.imports.keys():
        # a statement that fills or patches an imported object acts on whoever uses it
        module.definitions.setdefault(BODY, []).extend(module.definitions[name])
    return module


def _take(module: Module, statement: ast.stmt) -> None:
    """Enter one top-level statement under the names that it binds."""
    if _is_text(statement) or _is_main_guard(statement) or isinstance(statement, ast.Pass):
        return
    names, bare = set[str](), False
    for part in _simple_parts(statement):
        if isinstance(part, ast.Import | ast.ImportFrom):
            for name, target in module.targets(part):
                if name == "*":
                    module.stars.append(target.module)
                else:
                    module.imports[name] = target
        elif not _is_text(part):
            bound = _bound_names(part)
            names |= bound
            bare = bare or not bound
    for name in names - {"__all__"}:
        module.definitions.setdefault(name, []).append(statement)
    if bare:
        module.definitions.setdefault(BODY, []).append(statement)
    if isinstance(statement, (*_FUNCTIONS, ast.ClassDef)):
        for decorator in statement.decorator_list:
            called = decorator.func if isinstance(decorator, ast.Call) else decorator
            chain = attribute_chain(called)
            if chain and chain[-1] == "register":
                module.registrations.append((chain[:-1], statement.name))


def attribute_chain(node: ast.expr) -> tuple[str, ...]:
    """Return ("c", "f", "g") for `c.f.g`; empty if it does not start with a name."""
    attributes: list[str] = []
    while isinstance(node, ast.Attribute):
        attributes.append(node.attr)
        node = node.value
    return (node.id, *reversed(attributes)) if isinstance(node, ast.Name) else ()


def _simple_parts(statement: ast.stmt) -> Iterator[ast.stmt]:
    """Yield a statement, or what is inside an `if`, `try`, `with` or loop at module level."""
    blocks = [
        block
        for name in ("body", "orelse", "finalbody")
        if isinstance(block := getattr(statement, name, None), list)
    ]
    blocks += [handler.body for handler in getattr(statement, "handlers", [])]
    if not blocks or isinstance(statement, (*_FUNCTIONS, ast.ClassDef)):
        yield statement
        return
    if isinstance(statement, ast.For | ast.With):
        yield statement
    for block in blocks:
        for inner in block:
            if not isinstance(inner, ast.Pass):
                yield from _simple_parts(inner)


def _bound_names(statement: ast.stmt) -> set[str]:
    """Return the top-level names that a statement binds, or whose object it fills or changes."""
    if isinstance(statement, (*_FUNCTIONS, ast.ClassDef)):
        return {statement.name}
    places: list[ast.expr] = []
    if isinstance(statement, ast.Assign | ast.Delete):
        places = list(statement.targets)
    elif isinstance(statement, ast.AugAssign | ast.AnnAssign | ast.For):
        places = [statement.target]
    elif isinstance(statement, ast.With):
        places = [item.optional_vars for item in statement.items if item.optional_vars]
    elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        called = statement.value.func  # NAMES.append(...), TABLE.update(...)
        places = [called.value] if isinstance(called, ast.Attribute) else []
    elif isinstance(statement, ast.stmt) and hasattr(statement, "name"):
        places = [statement.name]  # `type X = ...` of Python 3.12
    names = set()
    for place in places:
        parts = place.elts if isinstance(place, ast.Tuple | ast.List) else [place]
        for part in parts:
            while isinstance(part, ast.Attribute | ast.Subscript | ast.Starred):
                part = part.value
            if isinstance(part, ast.Name):
                names.add(part.id)
    return names


def _is_text(statement: ast.stmt) -> bool:
    """Tell whether a statement is a bare string: a docstring, or one under an attribute."""
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _is_main_guard(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and any(
        isinstance(node, ast.Name) and node.id == "__name__" for node in ast.walk(statement.test)
    )


def _hash(statements: list[ast.stmt]) -> str:
    text = "\n".join(_spell(statement) for statement in statements)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _spell(node: object) -> str:
    """Spell a syntax tree; empty fields are left out, so that Pythons with more fields agree."""
    if isinstance(node, ast.AST):
        fields = (
            f"{name}={_spell(value)}"
            for name, value in ast.iter_fields(node)
            if value is not None and value != [] and name not in ("kind", "type_comment", "ctx")
        )
        if isinstance(node, ast.Constant):
            return f"Constant({node.value!r})"  # None is a value here, not an empty field
        return f"{type(node).__name__}({','.join(fields)})"
    if isinstance(node, list):
        kept = (item for item in node if not (isinstance(item, ast.stmt) and _is_text(item)))
        return f"[{','.join(_spell(item) for item in kept)}]"
    return repr(node)
