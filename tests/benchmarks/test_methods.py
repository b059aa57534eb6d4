"""What each method takes beside svd_llm: a first budget from nothing, and a second after it."""

from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.commands import llama
from tests.benchmarks.conftest import Bench
from tests.pipeline import pico

METHODS = (
    "svd_llm:update=u",
    "svd_llm_v2",
    "fwsvd",
    "ada_svd",
    "ada_svd:sweeps=15",
    "saes_svd",
    "basis_sharing",
    "duo_svd@uniform",
    "svd_llm@hull",
    "svd_llm@knapsack",
    "duo_svd",
)
NOT_COUNTED = ("tokenise", "materialise", "evaluate")  # the same for every method


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> pico.Inputs:
    """A random Llama of real proportions, of 4.7 million parameters."""
    return pico.make_inputs(tmp_path_factory.mktemp("inputs"), config=llama(256, 704, 6))


def seconds_of(inputs: pico.Inputs, home: Path, method: str, kept: float) -> float:
    settings: dict[str, Any] = inputs.settings(home, method=method, kept=kept)
    walk = pico.walk(settings | {"samples": 48, "length": 128})
    return sum(o.seconds for o in walk.outcomes if o.stage not in NOT_COUNTED)


def test_methods_beside_svd_llm(bench: Bench, inputs: pico.Inputs, tmp_path: Path) -> None:
    """Multiples of svd_llm's first run, statistics and decompositions included."""
    base = seconds_of(inputs, tmp_path / "svd_llm", "svd_llm", 0.6)
    for number, method in enumerate(METHODS):
        home = tmp_path / str(number)
        first = seconds_of(inputs, home, method, 0.6)
        second = seconds_of(inputs, home, method, 0.5)
        bench.row(
            benchmark=f"method {method}",
            first_budget=f"{first / base:.2f}",
            second_budget=f"{second / base:.2f}",
        )
