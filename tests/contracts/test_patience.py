"""What the tests wait for has one limit: `tests.patience`; a machine may be as busy as it likes."""

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.patience import is_answered, wait_for

TESTS = Path(__file__).resolve().parents[1]
LONG = 10  # seconds; what is shorter is a look, and comes again


def own_limits(tree: ast.AST) -> Iterator[int]:
    """Lines that wait for a number of seconds of their own: `timeout=60`, `monotonic() + 120`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "timeout":
            number = node.value
        elif isinstance(node, ast.BinOp) and "monotonic()" in ast.unparse(node.left):
            number = node.right
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".wait") and node.args:
            number = node.args[0]
        else:
            continue
        limit = number.value if isinstance(number, ast.Constant) else None
        if isinstance(limit, int | float) and limit >= LONG:
            yield number.lineno


def test_no_test_has_a_limit_of_its_own() -> None:
    found = {
        str(file.relative_to(TESTS)): lines
        for file in sorted(TESTS.rglob("*.py"))
        if (lines := list(own_limits(ast.parse(file.read_text()))))
    }
    assert found == {}


@pytest.mark.parametrize(
    "line", ["f(timeout=60)", "end = time.monotonic() + 120.0", "process.wait(30)"]
)
def test_a_limit_is_seen(line: str) -> None:
    assert list(own_limits(ast.parse(line))) == [1]


def test_an_answer_is_waited_for() -> None:
    said = iter([None, 0, "", "here"])
    assert wait_for(lambda: next(said), every=0) == "here"
    assert not is_answered("http://127.0.0.1:9/")


def test_of_a_process_that_ended_nothing_is_waited_for() -> None:
    with subprocess.Popen(["false"]) as ended, pytest.raises(AssertionError):
        wait_for(lambda: None, every=0, of=ended)
