"""Gates as people write them: YAML beside the configuration, a line per metric.

```yaml
perplexity: {max: 20, worse_than_dense: 10%, worse_than_champion: 2%}
tasks/arc_easy/acc: {worse_than_champion: 1%, standard_errors: 1}
bytes: {max: 250MB}
generation: {prompts: ["The capital of France is"], max_repetition: 0.8}
```
"""

import re
import reprlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ByteSize, ConfigDict, Field, TypeAdapter, ValidationError

from compress_core.errors import ConfigError
from flows.settings.reading import one_line, read_yaml
from flows.settings.words import check_value
from tasks.promotion.gates import Allowance, Gate
from tasks.promotion.metrics import BYTES, find_metric

FLAG = "--gates"
GENERATION = "generation"
PROMPTS = ("The capital of France is", "Once upon a time", "In the morning she")
DEFAULTS: dict[str, Any] = {"perplexity": {"worse_than_champion": "2%"}, GENERATION: {}}
"""What a version has to keep where no file says it."""

MOST_TOKENS = 4096


class Limits(BaseModel):
    """What one metric has to keep, before its words are read."""

    model_config = ConfigDict(extra="forbid")

    max: float | str | None = None
    min: float | str | None = None
    worse_than_dense: float | str | None = None
    worse_than_champion: float | str | None = None
    standard_errors: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    better: str | None = None


class Generation(BaseModel):
    """What a few greedy continuations have to keep.

    Attributes:
        prompts: What is continued, one at a time.
        new_tokens: Tokens that are generated after each.
        max_repetition: Mean share of runs of four tokens that may have been there before.
    """

    model_config = ConfigDict(extra="forbid")

    prompts: Annotated[list[str], Field(min_length=1, max_length=100)] = list(PROMPTS)
    new_tokens: Annotated[int, Field(ge=8, le=MOST_TOKENS)] = 64
    max_repetition: Annotated[float, Field(ge=0, le=1)] = 0.8


@dataclass(frozen=True)
class Gates:
    """All gates of a promotion.

    Attributes:
        limits: One per metric.
        generation: The smoke test; None where it is not asked for.
        source: Where they are from, for people.
    """

    limits: list[Gate] = field(default_factory=list)
    generation: Generation | None = None
    source: str = "the defaults"


def read_gates(file: Path | None) -> Gates:
    """The gates of a file, or the defaults.

    Raises:
        ConfigError: The file cannot be read, or a metric or a limit in it is none.
    """
    if file is None:
        return build_gates(DEFAULTS, "the defaults")
    return build_gates(read_yaml(file, FLAG), str(file))


def build_gates(values: dict[str, Any], source: str) -> Gates:
    """Gates of metric names to limits.

    Raises:
        ConfigError: A metric or a limit is none, or there are no gates at all.
    """
    if not values:
        raise ConfigError(f"{FLAG} {source} has no gates: name a metric and its limits")
    limits, generation = [], None
    for name, given in values.items():
        given = {} if given is None and name == GENERATION else given
        if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
            raise ConfigError(
                f"gates: {name} takes limits like {{max: 20, worse_than_champion: 2%}}, got "
                f"{reprlib.repr(given)}"
            )
        check_value(f"gates: {name}", given, boolean=False)
        try:
            if name == GENERATION:
                generation = Generation(**given)
            else:
                limits.append(_gate(name, Limits(**given)))
        except ValidationError as error:
            kind = Generation if name == GENERATION else Limits
            line = one_line(kind.model_fields, {}, error, None)
            raise ConfigError(f"gates: {name}: {line}") from None
    return Gates(limits, generation, source)


def _gate(name: str, limits: Limits) -> Gate:
    if limits.better not in (None, "lower", "higher"):
        raise ConfigError(f"gates: {name}: better is lower or higher, got {limits.better!r}")
    metric = find_metric(name, limits.better)
    gate = Gate(
        metric,
        _number(name, "max", limits.max),
        _number(name, "min", limits.min),
        _allowance(name, "worse_than_dense", limits.worse_than_dense),
        _allowance(name, "worse_than_champion", limits.worse_than_champion),
        limits.standard_errors,
    )
    bounds = (gate.max, gate.min, gate.worse_than_dense, gate.worse_than_champion)
    if all(bound is None for bound in bounds):
        raise ConfigError(
            f"gates: {name} has no limit: give max, min, worse_than_dense or worse_than_champion"
        )
    if gate.max is not None and gate.min is not None and gate.min > gate.max:
        raise ConfigError(f"gates: {name}: nothing is over {gate.min:g} and under {gate.max:g}")
    if gate.worse_than_dense is not None and metric.dense is None:
        raise ConfigError(
            f"gates: {name} has no worse_than_dense: of the dense model it is not known"
        )
    return gate


def _number(name: str, limit: str, given: float | str | None) -> float | None:
    """A limit in the metric's unit; of bytes it may be a size."""
    if given is None or isinstance(given, float | int):
        number = given
    else:
        if name not in BYTES:
            raise ConfigError(f"gates: {name}: {limit} is a number, got {given!r}")
        try:
            number = float(TypeAdapter(ByteSize).validate_python(given))
        except ValidationError:
            raise ConfigError(
                f"gates: {name}: {limit} is a size like 250MB, got {given!r}"
            ) from None
    if number is not None and not abs(number) < float("inf"):
        raise ConfigError(f"gates: {name}: {limit} is a number, got {number}")
    return number


def _allowance(name: str, limit: str, given: float | str | None) -> Allowance | None:
    if given is None:
        return None
    number = (
        re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*%\s*", given) if isinstance(given, str) else None
    )
    if number:
        return Allowance(float(number[1]) / 100, relative=True)
    if isinstance(given, str) and name in BYTES:
        return Allowance(_number(name, limit, given) or 0.0, relative=False)
    if isinstance(given, str) or not 0 <= given < float("inf"):
        raise ConfigError(
            f"gates: {name}: {limit} is a share like 2% or a difference, 0 or more, got {given!r}"
        )
    return Allowance(float(given), relative=False)
