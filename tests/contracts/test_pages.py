"""What pages say exists (commands, flags, links, files), and pages that are made are up to date."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from compress_core.allocate import ALLOCATORS
from flows.commands.cli import app
from flows.report.markdown import markdown_table
from tests.pages import file_map
from tests.pages.__main__ import made, recorded

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "docs" / "results" / "README.md"]
PAGES.append(ROOT / "deployments" / "README.md")
CODE = re.compile(r"```sh\n(.*?)```|`([^`\n]+)`", re.DOTALL)
FILES = [
    file
    for folder in (*file_map.PACKAGES, "docs", "deployments")
    for file in ROOT.joinpath(folder).rglob("*.*")
]
WRITTEN_BY_READERS = {"nightly.yaml", "gates.yaml", "compress_core/methods/mine.py"}
SENTENCE = 60  # characters from which a line is prose
OTHER_TOOLS = re.compile(r"(?:prefect|mlflow|pip|pytest) .*")


def commands() -> dict[str, set[str]]:
    """Every command of the command line ("run", "store ls") and its flags."""
    found: dict[str, set[str]] = {}
    todo = [("", typer.main.get_command(app))]
    for words, command in todo:
        subcommands = getattr(command, "commands", {})
        todo += [(f"{words} {name}".strip(), child) for name, child in subcommands.items()]
        options = (parameter.opts + parameter.secondary_opts for parameter in command.params)
        found[words] = {flag for flags in options for flag in flags} | {"--help"}
    return found


COMMANDS = commands()
FLAGS = set().union(*COMMANDS.values())


def code_lines(page: Path) -> Iterator[str]:
    """Lines of shell blocks and pieces of inline code, without comments and other tools' words."""
    for block, inline in CODE.findall(page.read_text(encoding="utf-8")):
        for line in (block or inline).splitlines():
            yield OTHER_TOOLS.sub("", line.partition(" # ")[0])


def test_the_readme_is_short_and_comes_to_ones_own_model_early() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert any("eigenpress run --model" in line for line in lines[:35])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_says_nothing_twice(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    prose = Counter(line for line in lines if len(line) > SENTENCE and not line.startswith("|"))
    assert not [line for line, times in prose.items() if times > 1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_flags_on_a_page_exist(page: Path) -> None:
    for line in code_lines(page):
        flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", line))
        if called := re.search(r"\beigenpress ((?:store )?[a-z]+)(?![\w/.])(.*)", line):
            assert called[1] in COMMANDS, line
            own = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", called[2]))
            assert own <= COMMANDS[called[1]], line
        assert flags <= FLAGS, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_targets_of_make_on_a_page_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in code_lines(page):
        if called := re.match(r"make (?:PYTHON=\S+ )?([a-z]+)", line):
            assert called[1] in targets, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_on_a_page_lead_to_files_and_headings(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        target, _, heading = link.partition("#")
        if "://" in target:
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {title.lower().replace(" ", "-") for title in titles}, link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_modules_named_on_a_page_exist(page: Path) -> None:
    for _, word in CODE.findall(page.read_text(encoding="utf-8")):
        if re.fullmatch(r"[\w/-]+\.(py|md|yaml)", word) and word not in WRITTEN_BY_READERS:
            parts = Path(word).parts
            assert any(file.parts[-len(parts) :] == parts for file in FILES), word
        if re.fullmatch(r"(compress_core|flows|tasks|storage)(\.\w+)+", word):
            place = ROOT / word.replace(".", "/")
            modules = (place.with_suffix(".py"), place, place.parent.with_suffix(".py"))
            assert any(module.exists() for module in modules), word


def test_what_a_page_says_is_in_a_file_is_there() -> None:
    said = [
        pair
        for page in PAGES
        for pair in re.findall(r"`(\w+)`\s+(?:in|\()\s*`([\w/]+\.py)`", page.read_text())
    ]
    assert len(said) >= 4
    for name, word in said:
        parts = Path(word).parts
        texts = [file.read_text() for file in FILES if file.parts[-len(parts) :] == parts]
        made = rf"^(?:(?:class|def) {name}\b|{name}\b[^=\n]*=)"
        assert any(re.search(made, text, re.MULTILINE) for text in texts), name


def test_the_table_of_allocators_names_each_of_them() -> None:
    text = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    table = text.split("| `--allocate` |")[1].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == list(ALLOCATORS)


def test_pages_that_are_made_are_what_the_command_makes() -> None:
    for page, text in made().items():
        assert page.read_text(encoding="utf-8") == text, "run `make docs`"


def test_the_map_names_every_file_once() -> None:
    text = file_map.PAGE.read_text(encoding="utf-8")
    links = [(file_map.PAGE.parent / link).resolve() for link in re.findall(r"\]\((.*?)\)", text)]
    assert len(links) == len(set(links))
    folders = [ROOT / name for name in (*file_map.PACKAGES, "deployments", "docs")]
    files = {file for folder in folders for file in folder.rglob("*.py")}
    assert {file for file in links if file.suffix == ".py"} == {
        file for file in files if file.name != "__init__.py"
    }
    assert set(PAGES) - {file_map.PAGE} == {file for file in links if file.suffix == ".md"}


def test_a_table_of_results_is_made_of_the_results_beside_it() -> None:
    # The oldest results do not say how much memory a model takes, as tables do now.
    tables = {file: runs for file, runs in recorded().items() if "memory" in runs[0]}
    assert len(tables) > 10
    for file, runs in tables.items():
        assert file.with_name("table.md").read_text(encoding="utf-8") == markdown_table(runs)


def test_kept_is_the_only_word_for_a_share() -> None:
    words = re.compile(r"\bratio\b", re.IGNORECASE)
    for package in ("compress_core", "storage", "tasks", "flows"):
        for file in (ROOT / package).rglob("*.py"):
            assert not words.search(file.read_text()), f"{file}: kept is the word"
