"""A good command line, to be made a bad one in one place."""

from typing import Any

from tests.pipeline import pico


def words_of(inputs: pico.Inputs, **changes: Any) -> list[str]:
    """A good `run` of `svd_llm` in ./home, with changes; None leaves a flag out."""
    settings: dict[str, Any] = {
        **({} if "methods" in changes else {"method": "svd_llm"}),
        "model": inputs.model,
        "calibration": inputs.calibration,
        "eval_text": inputs.evaluation,
        "kept": 0.6,
        "samples": 4,
        "length": 32,
        "device": "cpu",
        "home": "home",
    }
    words = ["run"]
    for name, value in (settings | changes).items():
        if value is not None:
            words += ["--" + name.replace("_", "-"), str(value)]
    return words
