"""How numbers are rounded to codes: all that a user can say of it."""

from dataclasses import dataclass

from compress_core.forms.names import GROUP

GPTQ, NEAREST = "gptq", "nearest"
FULL = 16


@dataclass(frozen=True)
class Coding:
    bits: int
    group: int = GROUP
    rounding: str = GPTQ
    damping: float = 0.01
    search: bool = False
    order: bool = False
    pivot_bits: int = 0
    product_bits: int = 0

    def bits_of(self, slot):
        return self.bits

    @property
    def reads_inputs(self):
        return self.rounding == GPTQ
