"""How numbers are rounded to codes: all that can be said of it."""

from dataclasses import dataclass, replace

from compress_core.errors import ConfigError
from compress_core.forms.names import BITS, CODE_GROUP, FULL, GROUP, ROUNDING, WIDTHS
from compress_core.options import one_of

GPTQ, NEAREST = "gptq", "nearest"
ROUNDINGS = (GPTQ, NEAREST)


@dataclass(frozen=True)
class Coding:
    """How what a layer stores is rounded.

    Attributes:
        bits: Of every code; 0 where each layer's share says it.
        group: Numbers that share a scale.
        rounding: "gptq", or "nearest", which reads no inputs and fits nothing again.
        damping: Part of the mean of H's diagonal that is added to it.
        search: Codes of so many bits at most have the ends of a group drawn in where that has
            less error.
        order: Whether GPTQ goes through the columns by falling diagonal of H. Groups stay those
            of neighbours; where they run across the columns, their scales are those of the matrix
            as it is given.
        widths: Slots that have bits of their own, ``FULL`` among them, with these.
        turns: Times that a whole weight and a product beside it are each fitted to what the other
            leaves; the best of all turns stays.
    """

    bits: int = 0
    group: int = GROUP
    rounding: str = GPTQ
    damping: float = 0.01
    search: int = 0
    order: bool = False
    widths: tuple[tuple[str, int], ...] = ()
    turns: int = 1

    def __post_init__(self) -> None:
        known = ", ".join(map(str, WIDTHS))
        if self.bits not in (0, *WIDTHS):
            raise ConfigError(f"{BITS} are {FULL}, or {known} for codes; got {self.bits}")
        for slot, bits in self.widths:
            if bits not in (FULL, *WIDTHS):
                raise ConfigError(
                    f"{slot} can be in codes of {known} bits or in {FULL}: got {bits}"
                )
        if self.group < 1:
            raise ConfigError(f"{CODE_GROUP} is at least 1 number, got {self.group}")
        one_of("codes", ROUNDING, self.rounding, ROUNDINGS)
        if not 0 <= self.damping < float("inf"):
            raise ConfigError(
                f"damping, a part of the mean of H, is 0 or more; got {self.damping:g}"
            )
        if self.turns < 1:
            raise ConfigError(f"turns must be at least 1, got {self.turns}")

    @property
    def reads_inputs(self) -> bool:
        """Whether it needs the second moment of a layer's inputs."""
        return self.rounding == GPTQ

    def searches(self, bits: int) -> bool:
        """Whether codes of some bits have the ends of their groups drawn in."""
        return bits <= self.search

    def at(self, bits: int) -> "Coding":
        """The same in codes of so many bits."""
        return replace(self, bits=bits)

    def bits_of(self, slot: str) -> int:
        """Bits of a number in a slot.

        Raises:
            ConfigError: Neither it nor a share says.
        """
        bits = dict(self.widths).get(slot, self.bits)
        if not bits:
            raise ConfigError(f"nothing says how many bits the codes of {slot} have: give bits")
        return bits
