"""How numbers are rounded to codes: all that a user can say of it."""

import math
from dataclasses import dataclass

from compress_core.errors import ConfigError
from compress_core.forms.names import BITS, CODE_GROUP, FULL, GROUP, ROUNDING, WIDTHS
from compress_core.options import one_of

GPTQ, NEAREST = "gptq", "nearest"
ROUNDINGS = (GPTQ, NEAREST)


@dataclass(frozen=True)
class Coding:
    """How numbers are rounded to codes.

    Attributes:
        bits: Of a code, one of ``WIDTHS``; 0 where every layer's share says its own.
        group: Codes that share a scale.
        rounding: "gptq" in the metric of the inputs, or each to its "nearest".
        damping: Part of the mean of H's diagonal that "gptq" adds to it.
    """

    bits: int
    group: int = GROUP
    rounding: str = GPTQ
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.bits not in (0, FULL, *WIDTHS):
            widths = ", ".join(map(str, WIDTHS))
            raise ConfigError(f"{BITS} are {FULL}, or {widths} for codes; got {self.bits}")
        if not 8 <= self.group <= 4096:
            raise ConfigError(f"{CODE_GROUP} is from 8 to 4096, got {self.group}")
        one_of("codes", ROUNDING, self.rounding, ROUNDINGS)
        if not 0 <= self.damping < math.inf:
            raise ConfigError(f"damping is 0 or more, got {self.damping:g}")

    @property
    def reads_inputs(self) -> bool:
        """Whether it reads second moments of the inputs."""
        return self.rounding == GPTQ
