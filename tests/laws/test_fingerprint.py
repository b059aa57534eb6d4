"""Laws of the code fingerprint: it moves with what the reached code does, and with nothing else."""

import importlib
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from storage.errors import StorageError
from storage.fingerprint import code_fingerprint

Files = dict[str, str]

FILES = {
    "__init__.py": '''
        """A package that must never be imported."""
        from .algebra import solve as public_solve
        raise RuntimeError("imported")
    ''',
    "constants.py": """
        SCALE: float = 2.0
        UNUSED = 1
        TABLE = {"a": SCALE}
        TABLE["b"] = 4.0
    """,
    "algebra.py": '''
        import math
        from .constants import SCALE, UNUSED
        from . import constants as c

        raise RuntimeError("imported")

        class Base:
            """Base."""
            def width(self):
                return 1

        class Child(Base):
            attribute: int = 3

        def helper(x):
            """Scale x."""
            return x * SCALE  # scaled

        def solve(x):
            local = helper(x)
            return math.sqrt(local) + c.TABLE["a"]

        def unrelated(x):
            return helper(x) + UNUSED

        def build() -> "Child":
            def inner(helper):
                return [unrelated for unrelated in helper]
            return inner
    ''',
    "sub/__init__.py": "from ..algebra import helper as renamed",
    "sub/late.py": """
        def late(x):
            from pkg_name.algebra import build as make
            import pkg_name.sub as s
            return make(s.renamed(x))

        def whole(name):
            from .. import constants
            return getattr(constants, name)
    """,
    "dispatch.py": """
        import functools
        from .algebra import Child
        import pkg_name as top

        @functools.singledispatch
        def cost(x):
            raise TypeError

        @cost.register
        def _(x: Child):
            return 1

        def through_package(x):
            return top.public_solve(x)
    """,
    "elsewhere.py": """
        from . import dispatch

        @dispatch.cost.register(int)
        def cost_of_int(x):
            return 2
    """,
}


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest):
    """Write the package with some texts replaced; return what takes fingerprints of it."""
    name = "pkg_" + re.sub(r"\W", "_", request.node.name)[:40]
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(*changes: tuple[str, str]) -> Callable[..., Files]:
        for relative, text in FILES.items():
            path = tmp_path / name / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            text = textwrap.dedent(text)
            for old, new in changes:
                text = text.replace(old, new)
            path.write_text(text.replace("pkg_name", name))
        importlib.invalidate_caches()

        def fingerprint(*entry_points: str) -> Files:
            found = code_fingerprint([f"{name}.{entry}" for entry in entry_points], [name])
            assert name not in sys.modules
            return {key.removeprefix(f"{name}."): value for key, value in found.items()}

        return fingerprint

    return write


def reached(fingerprint: Files) -> set[str]:
    return {name for name in fingerprint if "<body>" not in name}


def test_reach_is_transitive_and_no_wider(write) -> None:
    assert reached(write()("algebra.solve")) == {
        "algebra.solve",
        "algebra.helper",
        "constants.SCALE",
        "constants.TABLE",
    }


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("algebra.build", {"algebra.build", "algebra.Child", "algebra.Base"}),
        (
            "sub.late.late",
            {"sub.late.late", "algebra.build", "algebra.helper", "algebra.Child", "algebra.Base"}
            | {"constants.SCALE"},
        ),
        (
            "sub.late.whole",
            {"sub.late.whole", "constants.SCALE", "constants.UNUSED", "constants.TABLE"},
        ),
        (
            "dispatch.cost",
            {"dispatch.cost", "dispatch._", "algebra.Child", "algebra.Base"}
            | {"elsewhere.cost_of_int"},
        ),
        (
            "dispatch.through_package",
            {"dispatch.through_package", "algebra.solve", "algebra.helper"}
            | {"constants.SCALE", "constants.TABLE"},
        ),
        ("sub.renamed", {"algebra.helper", "constants.SCALE"}),
    ],
)
def test_reach_follows_imports_annotations_bases_and_registrations(
    write, entry: str, expected: set[str]
) -> None:
    assert reached(write()(entry)) == expected


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("  # scaled", ""),
        ('"""Scale x."""', '"""Multiply."""'),
        ('    """Scale x."""\n', ""),
        ("return x * SCALE", "return (\n        x\n        * SCALE\n    )"),
        ("import math\n", "import math\n\n\n# a comment\n"),
        ("+ UNUSED", "+ 3 * UNUSED"),
        ("UNUSED = 1", "UNUSED = 2"),
        ("def unrelated(x):", "def added():\n    return 0\n\ndef unrelated(x):"),
        ("return 1", "return 100"),
    ],
)
def test_what_does_not_change_the_reached_code_moves_nothing(write, old: str, new: str) -> None:
    before = write()("algebra.solve")
    after = write((old, new))("algebra.solve")
    assert after == before


@pytest.mark.parametrize(
    ("entry", "old", "new", "moved"),
    [
        ("algebra.solve", "SCALE: float = 2.0", "SCALE: float = 3.0", "constants.SCALE"),
        ("algebra.solve", 'TABLE["b"] = 4.0', 'TABLE["b"] = 5.0', "constants.TABLE"),
        ("algebra.solve", "return x * SCALE", "return SCALE * x", "algebra.helper"),
        ("algebra.build", "return 1", "return 2", "algebra.Base"),
        ("algebra.build", "attribute: int = 3", "attribute: int = 4", "algebra.Child"),
        ("dispatch.cost", "return 2", "return 3", "elsewhere.cost_of_int"),
        ("algebra.solve", 'RuntimeError("imported")', 'ValueError("x")', "algebra.<body>"),
    ],
)
def test_a_change_in_the_reached_code_moves_exactly_its_own_hash(
    write, entry: str, old: str, new: str, moved: str
) -> None:
    before = write()(entry)
    after = write((old, new))(entry)
    assert {name for name in before if before[name] != after.get(name)} - {"<body>"} == {moved}
    assert before.keys() == after.keys()


def test_an_entry_point_that_does_not_exist_is_refused(write) -> None:
    fingerprint = write()
    with pytest.raises(StorageError, match=r"'nothing' is not defined .* defines .*solve"):
        fingerprint("algebra.nothing")
    with pytest.raises(StorageError, match="no module of the packages"):
        fingerprint("nowhere.solve")
    with pytest.raises(StorageError, match="no module of the packages"):
        fingerprint("algebra.Base.width")
    with pytest.raises(StorageError, match="not defined at the top level"):
        fingerprint("algebra")
    with pytest.raises(StorageError, match="there is no package"):
        code_fingerprint([], ["no_such_package_at_all"])


def test_closed_modules_are_neither_reached_nor_reached_through(write, tmp_path: Path) -> None:
    write()
    (name,) = (path.name for path in tmp_path.iterdir())
    entry, constants = [f"{name}.algebra.solve"], f"{name}.constants"
    whole = code_fingerprint(entry, [name])
    closed = code_fingerprint(entry, [name], [constants])
    assert {key for key in whole if not key.startswith(f"{constants}.")} == set(closed)
    assert len(closed) < len(whole)


def test_hashes_are_short_sorted_and_the_same_in_another_process(write, tmp_path: Path) -> None:
    found = write()("algebra.solve", "algebra.build")
    assert list(found) == sorted(found)
    assert all(re.fullmatch("[0-9a-f]{16}", value) for value in found.values())
    (name,) = (path.name for path in tmp_path.iterdir())
    code = (
        "from storage.fingerprint import code_fingerprint as f; "
        f"print(f(['{name}.algebra.build', '{name}.algebra.solve'], ['{name}']))"
    )
    root = str(Path(__file__).resolve().parents[2])
    other = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": f"{root}:{tmp_path}", "PYTHONHASHSEED": "5"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == str({f"{name}.{key}": value for key, value in found.items()})


def test_the_real_core_is_fingerprinted_without_torch() -> None:
    code = (
        "import sys; from storage.fingerprint import code_fingerprint as f; "
        "core = ['compress_core']; found = len(f(['compress_core.errors.ConfigError'], core)); "
        "print(found, 'torch' in sys.modules, 'compress_core' in sys.modules)"
    )
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["2", "False", "False"]
