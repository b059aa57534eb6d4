"""Methods still give the numbers they gave when they were checked against the papers."""

import json

import pytest

from compress_core.methods import METHODS
from tests.golden.make import FOLDER, entries, facts, golden_values

FILES = {file.stem: json.loads(file.read_text()) for file in FOLDER.glob("*.json")}
GOLDEN = {name: values for file in FILES.values() for name, values in file["values"].items()}
NAMES = [name for method in METHODS for name in entries(method)]


def test_every_method_has_a_file_with_its_golden_values() -> None:
    for method in METHODS:
        assert method in FILES, f"run `make golden NAME={method}`"
        assert set(FILES[method]["values"]) == set(entries(method)), f"make golden NAME={method}"
    assert set(FILES) == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_its_defaults_and_what_it_reads_have_not_changed(method: str) -> None:
    assert facts(method) == FILES[method]["facts"]


@pytest.mark.parametrize("name", NAMES)
def test_the_numbers_have_not_moved(name: str) -> None:
    found = golden_values(name)
    assert {x: set(values) for x, values in found.items()} == {
        x: set(values) for x, values in GOLDEN[name].items()
    }
    for shape, values in found.items():
        for what, numbers in values.items():
            assert numbers == pytest.approx(GOLDEN[name][shape][what], rel=1e-5, abs=1e-6), (
                f"{name} {shape} {what} changed; if that is meant, `make golden NAME=...`, say why"
            )


def test_methods_that_differ_have_different_values() -> None:
    """Else a value would not show which method, refiner or allocator gave it."""
    assert len({json.dumps(values) for values in GOLDEN.values()}) == len(NAMES)
