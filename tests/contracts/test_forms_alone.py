"""Who asks which kind of part a layer is of: the kinds, and few places besides."""

import ast
from collections import Counter
from pathlib import Path

import compress_core

SOURCES = Path(compress_core.__file__).parent
ABOUT = ("folder", "layer", "recover")  # what reads, writes, makes and trains what layers store
OF_A_KIND = {"base", "codes", "columns", "index", "nonzeros", "pivot", "sparse", "CodedParts"}
ASKING = {
    "folder/for_vllm.py": 1,  # refuses codes
    "layer/make.py": 4,  # what a share asks for, and what robust PCA found
    "layer/stored.py": 5,  # what a method ended with, as parts
    "recover/parts.py": 1,  # of codes the scales are trained
}


def conditions(tree: ast.AST) -> list[ast.expr]:
    """Of every branch and filter."""
    found: list[ast.expr] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.If | ast.IfExp | ast.While):
            found.append(node.test)
        elif isinstance(node, ast.comprehension):
            found += node.ifs
        elif isinstance(node, ast.Match):
            found.append(node.subject)
    return found


def words(condition: ast.expr) -> set[str]:
    """Names, attributes and strings in it."""
    found = set()
    for node in ast.walk(condition):
        for field in ("id", "attr", "value"):
            word = getattr(node, field, None)
            if isinstance(word, str):
                found.add(word)
    return found


def test_few_places_outside_the_kinds_ask_for_one() -> None:
    asking: Counter[str] = Counter()
    for folder in ABOUT:
        for file in (SOURCES / folder).rglob("*.py"):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            asked = sum(bool(words(x) & OF_A_KIND) for x in conditions(tree))
            if asked:
                asking[file.relative_to(SOURCES).as_posix()] = asked
    assert asking == ASKING
