"""Who says how many bits numbers have: an option, a price list, the budget; one of them alone."""

import pytest

from compress_core.errors import ConfigError
from compress_core.methods import build_method
from compress_core.types import LayerRef

LAYER = LayerRef("model.layers.0.self_attn.q_proj", 0, 40, 40, "model.layers.0.self_attn.q_proj")


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("method", ["press", "svd_llm"])
def test_bits_are_not_said_where_prices_choose_them(method: str, bits: int) -> None:
    """Not even 16: what was bought in codes would be stored in numbers of 16 bits."""
    with pytest.raises(ConfigError, match=f"chooses bits itself: leave out bits={bits}"):
        build_method(f"{method}@prices:bits={bits}")
    fixed = build_method(f"{method}@prices:codes=false:bits={bits}")
    assert fixed.stacks([LAYER])[0].as_layer.bits == bits


@pytest.mark.parametrize(
    ("text", "how"),
    [
        ("rtn", "keeps the whole weight"),
        ("gptq:mixed=true", "keeps the whole weight"),
        ("caldera", "keeps the whole weight"),
        ("press", "buys ranks and bits from one list"),
        ("svd_llm@prices", "buys ranks and bits from one list"),
    ],
)
def test_shares_that_say_bits_are_not_rounded_to_multiples_of_a_rank(text: str, how: str) -> None:
    with pytest.raises(ConfigError, match=f"{how}: leave out --rank-multiple 8"):
        build_method(text, multiple=8)


def test_speeds_of_a_device_are_not_those_of_codes() -> None:
    with pytest.raises(ConfigError, match="are in no codes: leave out bits=4"):
        build_method("svd_llm@uniform:device=here:bits=4:factors=plain")
    with pytest.raises(ConfigError, match="from one list: leave out option device=here"):
        build_method("svd_llm@prices:device=here")
