"""Text of our modules for files that run where nothing of ours is installed."""

import ast
from pathlib import Path

_OURS = ("compress_core", "tasks")


def without_own_imports(file: Path) -> str:
    """The text of a module of ours, without the lines that import from our packages.

    Args:
        file: The module; what it imports from here is expected before it in the same file.
    """
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    for node in reversed(ast.parse("".join(lines)).body):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith(_OURS):
            del lines[node.lineno - 1 : node.end_lineno]
    return "".join(lines)
