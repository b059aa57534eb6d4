"""Codes in the keys of units: what hangs on bits, groups and rounding, and what does not."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline import pico

Recipes = dict[tuple[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> pico.Inputs:
    return pico.make_inputs(
        tmp_path_factory.mktemp("codes_keys"), config=partial(pico.llama, blocks=1)
    )


@pytest.fixture
def changed(inputs: pico.Inputs, tmp_path: Path) -> Any:
    """Which stages have other settings by one method than by another."""

    def recipes(method: str) -> Recipes:
        pipeline, _, _ = pico.build(inputs.settings(tmp_path, method=method))
        units = [unit for group in pipeline.groups for unit in group.units]
        return {(unit.stage, unit.name): dict(unit.settings) for unit in units}

    def compare(one: str, other: str) -> set[str]:
        first, second = recipes(one), recipes(other)
        return {unit[0] for unit in first.keys() & second.keys() if first[unit] != second[unit]}

    return compare


@pytest.mark.parametrize(
    ("one", "other", "stages"),
    [
        ("svd_llm", "svd_llm:bits=4", {"allocate", "realise"}),
        ("svd_llm:bits=4", "svd_llm:bits=3", {"allocate", "realise"}),
        ("svd_llm:bits=4", "svd_llm:bits=4:code_group=16", {"allocate", "realise"}),
        ("svd_llm:bits=4", "svd_llm:bits=4:rounding=nearest", {"realise"}),
        ("svd_llm@fisher", "svd_llm@prices", {"allocate", "predict", "realise"}),
        (
            "svd_llm@prices",
            "svd_llm@prices:code_group=16",
            {"allocate", "predict", "realise"},
        ),
        ("svd_llm@prices", "svd_llm@prices:rounding=nearest", {"realise"}),
        (
            "press",
            "press:factors=plain",
            {"decompose", "allocate", "predict", "realise"},  # more ranks pay in the pivot form
        ),
        ("press", "press:bits=16", {"allocate", "realise"}),
        ("press", "press:columns=true", {"allocate", "predict", "realise"}),
        ("gptq:mixed=true", "gptq:mixed=true:code_group=16", {"allocate", "predict", "realise"}),
        ("gptq:bits=4", "gptq:bits=4:damping=0.1", {"realise"}),
        ("gptq:bits=4", "gptq:bits=4:order=true", {"realise"}),
        ("gptq:bits=4", "gptq:bits=4:search=2", {"realise"}),
        ("caldera", "caldera:turns=2", {"realise"}),
        ("caldera", "caldera:factor_bits=8", {"allocate", "realise"}),
    ],
)
def test_a_choice_of_codes_is_in_the_keys_of_what_hangs_on_it(
    changed: Any, one: str, other: str, stages: set[str]
) -> None:
    found = changed(one, other)
    assert found - {"materialise", "evaluate"} == stages


@pytest.mark.parametrize("form", ["plain", "pivot"])
@pytest.mark.parametrize("bits", [8, 3])
def test_codes_share_the_decompositions_of_numbers_of_16_bits(
    changed: Any, form: str, bits: int
) -> None:
    found = changed(f"svd_llm:factors={form}", f"svd_llm:factors={form}:bits={bits}")
    assert "decompose" not in found
