"""The README's file tree names every file of the packages, and none that does not exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def tree_lines() -> list[str]:
    tree = (ROOT / "README.md").read_text().rpartition("## Files")[2]
    return tree.split("```")[1].splitlines()


@pytest.mark.parametrize("package", ["compress_core", "storage", "tasks", "flows"])
def test_the_tree_of_a_package_is_complete(package: str) -> None:
    inside, found = False, []
    for line in tree_lines():
        if line and not line.startswith(" "):
            inside = line.startswith(package + "/")
        elif inside:
            found += re.findall(r"[\w/]+\.py\b", line)
    named = set(found)
    assert len(found) == len(named), "a file stands there twice"
    files = {
        str(file.relative_to(ROOT / package))
        for file in (ROOT / package).rglob("*.py")
        if file.name != "__init__.py"
    }
    methods = {file for file in files if file.startswith("methods/")}
    assert {name for name in named if "/" not in name or name in files} >= files - methods
    existing = files | {Path(file).name for file in methods}
    assert named <= existing


def test_kept_is_the_only_word_for_a_share() -> None:
    words = re.compile(r"\bratio\b", re.IGNORECASE)
    for package in ("compress_core", "storage", "tasks", "flows"):
        for file in (ROOT / package).rglob("*.py"):
            assert not words.search(file.read_text()), f"{file}: kept is the word"
