"""The module-level names a definition refers to, with the attributes taken from them.

Names that a function binds itself (parameters, assignments, loop variables) do not count.
"""

import ast
from collections.abc import Iterator

from storage.source import Module, Target, attribute_chain

Chain = tuple[str, ...]
"""A name and the attributes taken from it: `c.f.g` is ("c", "f", "g")."""

Reference = tuple[Chain, Target | None]
"""A chain and, where its name was imported inside a function, what the name stands for."""

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_NAMED = (
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
    ast.ExceptHandler,
    ast.MatchAs,
    ast.MatchStar,
)
_NEW_SCOPE = (*_FUNCTIONS, *_COMPREHENSIONS, ast.ClassDef)

_Comprehension = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp

Scope = dict[str, Target | None]


def references(module: Module, name: str) -> list[Reference]:
    """List the references of one definition of a module, each once, in order of appearance."""
    if name not in module.referred:
        walker = _Walker(module)
        for statement in module.definitions[name]:
            walker.visit(statement)
        module.referred[name] = list(walker.found)
    return module.referred[name]


class _Walker(ast.NodeVisitor):
    """Collects references; `scopes` are the enclosing functions', innermost last."""

    def __init__(self, module: Module) -> None:
        self._module = module
        self._scopes: list[Scope] = []
        self.found: dict[Reference, None] = {}

    def visit_Name(self, node: ast.Name) -> None:
        if not isinstance(node.ctx, ast.Store):
            self._refer((node.id,))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if chain := attribute_chain(node):
            self._refer(chain)
        else:
            self.visit(node.value)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._visit_all(node.decorator_list)
        self._visit_signature(node.args)
        self._visit_annotation(node.returns)
        self._visit_inside(self._function_scope(node), node.body)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._visit_signature(node.args)
        self._visit_inside(self._function_scope(node), [node.body])

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self._visit_annotation(node.annotation)
        self._visit_all([node.target, *([node.value] if node.value else [])])

    def _visit_comprehension(self, node: _Comprehension) -> None:
        self.visit(node.generators[0].iter)  # evaluated outside
        targets = [name for generator in node.generators for name in ast.walk(generator.target)]
        scope: Scope = {name.id: None for name in targets if isinstance(name, ast.Name)}
        self._visit_inside(scope, list(ast.iter_child_nodes(node)))

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _visit_comprehension

    def _visit_signature(self, arguments: ast.arguments) -> None:
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        for argument in [*named, arguments.vararg, arguments.kwarg]:
            self._visit_annotation(argument.annotation if argument else None)
        self._visit_all([*arguments.defaults, *(node for node in arguments.kw_defaults if node)])

    def _visit_annotation(self, annotation: ast.expr | None) -> None:
        """Visit an annotation and the names in its quoted parts."""
        if annotation is None:
            return
        self.visit(annotation)
        for node in ast.walk(annotation):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                try:
                    quoted = ast.parse(node.value, mode="eval")
                except SyntaxError:  # a literal such as Literal["two words"], not a type
                    continue
                self.visit(quoted)

    def _visit_all(self, nodes: list[ast.expr]) -> None:
        for node in nodes:
            self.visit(node)

    def _visit_inside(
        self, scope: Scope, nodes: list[ast.AST] | list[ast.stmt] | list[ast.expr]
    ) -> None:
        self._scopes.append(scope)
        for node in nodes:
            self.visit(node)
        self._scopes.pop()

    def _function_scope(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> Scope:
        """Return the names that belong to a function, with the targets of those it imports."""
        arguments = node.args
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        scope: Scope = {
            argument.arg: None
            for argument in [*named, arguments.vararg, arguments.kwarg]
            if argument
        }
        outside: set[str] = set()
        imported: Scope = {}
        for inner in _own_nodes(node):
            if isinstance(inner, ast.Global):
                outside.update(inner.names)
            elif isinstance(inner, ast.Import | ast.ImportFrom):
                imported.update(self._module.targets(inner))
            elif isinstance(inner, _NAMED) and inner.name:
                scope[inner.name] = None
            elif isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                scope[inner.id] = None
        scope.update(imported)
        return {name: target for name, target in scope.items() if name not in outside}

    def _refer(self, chain: Chain) -> None:
        for scope in reversed(self._scopes):
            if chain[0] in scope:
                target = scope[chain[0]]
                if target is not None:
                    self.found[(chain, target)] = None
                return
        self.found[(chain, None)] = None


def _own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a function's body that run in its own scope."""
    body = getattr(function, "body", [])
    ahead: list[ast.AST] = list(body) if isinstance(body, list) else [body]
    while ahead:
        node = ahead.pop()
        yield node
        if not isinstance(node, _NEW_SCOPE):
            ahead.extend(ast.iter_child_nodes(node))
