"""Methods still give the numbers they gave when they were checked against the papers."""

import json

import pytest

from compress_core.methods import METHODS
from tests.golden.make import FILE, golden_values

GOLDEN = json.loads(FILE.read_text())


def test_every_method_has_golden_values() -> None:
    assert set(GOLDEN) == set(METHODS), "run `make golden` for the new method"


@pytest.mark.parametrize("name", METHODS)
def test_the_numbers_have_not_moved(name: str) -> None:
    for shape, values in golden_values(name).items():
        for what, numbers in values.items():
            assert numbers == pytest.approx(GOLDEN[name][shape][what], rel=1e-5, abs=1e-6), (
                f"{name} {shape} {what} changed; if that is meant, run `make golden` and say why"
            )
