from dataclasses import dataclass
from compress_core.forms.names import GROUP
@dataclass(frozen=True)
class Coding:
    bits: int = 0
    group: int = GROUP
    rounding: str = "gptq"
    damping: float = 0.01
    @property
    def reads_inputs(self): return self.rounding == "gptq"
