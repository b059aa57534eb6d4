"""Methods still give the numbers they gave when they were checked against the papers."""

import json

import pytest

from compress_core.methods import METHODS
from tests.golden.make import FILE, NAMES, golden_values

GOLDEN = json.loads(FILE.read_text())


def test_every_method_has_golden_values() -> None:
    assert set(METHODS) == {name.partition(":")[0] for name in NAMES}
    assert set(GOLDEN) == set(NAMES), "run `make golden` for the new method"


@pytest.mark.parametrize("name", NAMES)
def test_the_numbers_have_not_moved(name: str) -> None:
    found = golden_values(name)
    assert {x: set(values) for x, values in found.items()} == {
        x: set(values) for x, values in GOLDEN[name].items()
    }
    for shape, values in found.items():
        for what, numbers in values.items():
            assert numbers == pytest.approx(GOLDEN[name][shape][what], rel=1e-5, abs=1e-6), (
                f"{name} {shape} {what} changed; if that is meant, run `make golden` and say why"
            )


def test_methods_that_differ_have_different_values() -> None:
    """Else a value would not show which method, refiner or allocator gave it."""
    assert len({json.dumps(values) for values in GOLDEN.values()}) == len(NAMES)
