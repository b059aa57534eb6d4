"""The map of files: every file with its first line, folder by folder."""

import ast
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "map.md"
PACKAGES = ("flows", "tasks", "compress_core", "storage", "tests")
SINGLE = ("Makefile", "pyproject.toml", "constraints/cpu.txt", "deployments/prefect.yaml")


def render() -> str:
    """The page."""
    lines = ["# Map of the files", "", "Made by `make docs` from the first line of every file.", ""]
    lines += ["## The repository", "", *(_entry(ROOT / name) for name in SINGLE), ""]
    lines += ["## Pages", "", *(_entry(page) for page in _pages()), ""]
    lines += ["## Configurations of docs/results", "", *(_entry(file) for file in _configs())]
    for package in PACKAGES:
        for folder in [ROOT / package, *sorted((ROOT / package).rglob("*/"))]:
            if files := sorted(folder.glob("*.py")):
                marker = folder / "__init__.py"
                lines += ["", f"## {folder.relative_to(ROOT)}", "", first_line(marker), ""]
                lines += [_entry(file) for file in files if file != marker]
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


def _pages() -> list[Path]:
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), ROOT / "docs/results/README.md"]
    return [page for page in sorted(pages) if page != PAGE] + [ROOT / "deployments/README.md"]


def _configs() -> list[Path]:
    return sorted((ROOT / "docs" / "results").glob("*.yaml"))


def _entry(file: Path) -> str:
    link = os.path.relpath(file, PAGE.parent)
    name = file.relative_to(ROOT) if file.suffix != ".py" else Path(file.name)
    return f"* [{name}]({link}): {first_line(file)}"


def first_line(file: Path) -> str:
    """What a file says of itself: a docstring's first line, a page's title, a first comment.

    Raises:
        ValueError: It says nothing, or the line is not whole.
    """
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        line = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    else:
        line = text.partition("\n")[0].removeprefix("#").strip().removesuffix(".") + "."
    if not line.endswith((".", "?")) or len(line) < 4:
        raise ValueError(f"{file.relative_to(ROOT)} has to begin with one whole line about itself")
    return line.replace("``", "`")
