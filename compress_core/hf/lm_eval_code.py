"""The local files behind a task's Python: its modules, what they import and open beside them."""

import ast
import importlib.util
import inspect
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

_MOST_FOLDERS = 32  # named in one module, in which names are looked for
_LONGEST_NAME = 255


def is_installed(path: Path) -> bool:
    """Whether a file belongs to Python or an installed package: versions stand for those."""
    return any(path.is_relative_to(root) for root in _INSTALLED)


_INSTALLED = tuple(
    {
        Path(folder).resolve()
        for folder in [*sysconfig.get_paths().values(), sys.prefix, sys.base_prefix]
        if folder not in ("/", "/usr")  # under which too much lies; get_paths has its Python
    }
)


def code_files(
    functions: Iterable[Callable[..., Any]] = (), modules: Iterable[Path] = ()
) -> set[Path]:
    """The files that decide what functions of a task do, as far as their text shows.

    Args:
        functions: Functions and classes that a task names.
        modules: Files of modules that it names them in.

    Returns:
        The modules' files, local modules that those import, at any depth, and local files whose
        names stand in one of them as text. An installed module counts, what it imports does not.
    """
    found: set[Path] = set()
    sources = (_source_of(function) for function in functions)
    waiting = [*modules, *(source for source in sources if source is not None)]
    while waiting:
        path = waiting.pop().resolve()
        if path in found:
            continue
        found.add(path)
        if is_installed(path):
            continue
        with suppress(OSError, ValueError, SyntaxError):  # whoever imports it says so
            tree = ast.parse(path.read_bytes())
            found |= named_files(_texts(tree), path.parent)
            waiting += _imported(tree, path)
    return found


def forget(modules: Iterable[Path]) -> None:
    """Lets modules, and what lies below their folder and they import, be read anew."""
    for module in modules:
        if is_installed(module):
            continue
        files = {file for file in code_files(modules=[module]) if file.suffix == ".py"}
        for name, loaded in list(sys.modules.items()):
            origin = getattr(loaded, "__file__", None)
            path = Path(origin).resolve() if isinstance(origin, str) else None
            if path in files and path.is_relative_to(module.parent):
                del sys.modules[name]


def _source_of(function: Callable[..., Any]) -> Path | None:
    inner = inspect.unwrap(function)
    inner = getattr(inner, "func", inner)  # of a partial
    with suppress(TypeError):
        source = inspect.getsourcefile(inner if hasattr(inner, "__qualname__") else type(inner))
        return Path(source) if source else None
    return None


def _texts(tree: ast.AST) -> set[str]:
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def named_files(names: Iterable[str], folder: Path) -> set[Path]:
    """Files that texts may name: below a folder, the working directory, or a folder they name."""
    short = sorted(name for name in names if 0 < len(name) <= _LONGEST_NAME and "\0" not in name)
    folders = [folder, Path.cwd()]
    for name in short:
        folders += [f for f in _below(folders[:2], name, Path.is_dir) if f not in folders]
    return {
        file.resolve()
        for name in short
        for file in _below(folders[:_MOST_FOLDERS], name, Path.is_file)
    }


def _below(folders: Iterable[Path], name: str, wanted: Callable[[Path], bool]) -> Iterator[Path]:
    # The rest of an f"{folder}/name" begins with the slash.
    for path in {folder / n for folder in folders for n in (name, name.lstrip("/"))}:
        with suppress(OSError, ValueError):
            if path.name and wanted(path):
                yield path


def _imported(tree: ast.AST, path: Path) -> Iterator[Path]:
    """Files of the local modules that a module imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _module_files(alias.name, path.parent)
        elif isinstance(node, ast.ImportFrom):
            folder = path.parent
            for _ in range(node.level - 1):
                folder = folder.parent
            base = node.module or ""
            for name in [base, *(f"{base}.{a.name}".lstrip(".") for a in node.names)]:
                if name:
                    yield from _module_files(name, folder, relative=node.level > 0)


def _module_files(name: str, folder: Path, relative: bool = False) -> Iterator[Path]:
    """The files of a module and its packages, unless they are installed."""
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        place = folder.joinpath(*parts[:count])
        beside = [place.with_name(place.name + ".py"), place / "__init__.py"]
        yield from (file for file in beside if file.is_file())
        if not relative and (file := _found(".".join(parts[:count]))) is not None:
            yield file


def _found(name: str) -> Path | None:
    module = sys.modules.get(name)
    origin = getattr(module, "__file__", None)
    if module is None:
        with suppress(ImportError, ValueError, AttributeError):
            spec = importlib.util.find_spec(name) if "." not in name else None
            origin = spec.origin if spec is not None and spec.has_location else None
    if origin is None or not origin.endswith(".py"):
        return None
    path = Path(origin).resolve()
    return None if is_installed(path) else path
