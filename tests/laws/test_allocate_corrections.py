"""What a budget buys beside a base in codes: never more than it holds, and never a rank too few."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from compress_core.allocate.base import Evidence, budget_of
from compress_core.allocate.corrections import Corrections
from compress_core.coding.parts import code_layer
from compress_core.coding.settings import Coding
from compress_core.coding.whole import of_whole
from compress_core.errors import BudgetError, ConfigError
from compress_core.forms.kinds import pays
from compress_core.forms.names import FULL, WIDTHS
from compress_core.layer.stored import pack_layer
from compress_core.methods.caldera import FACTORS
from compress_core.types import LayerRef, Share, affordable
from tests.made_up import layers_of

TINY = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=5)
FORMS = st.sampled_from(["plain", "pivot", "auto"])


@given(
    shapes=TINY,
    kept=st.floats(0.02, 1.0),
    bits=st.sampled_from(WIDTHS),
    correction=st.sampled_from([FULL, *WIDTHS]),
    group=st.sampled_from([1, 5, 32]),
    form=FORMS,
)
def test_the_budget_is_held_and_every_layer_has_all_ranks_of_an_equal_part_of_the_rest(
    shapes: list[tuple[int, int]], kept: float, bits: int, correction: int, group: int, form: str
) -> None:
    layers = [replace(x, group=group) for x in layers_of(shapes, form)]
    allocator = Corrections(bits, correction)
    try:
        allocator.check(layers, kept)
    except BudgetError:
        assume(False)
    shares = allocator.allocate(layers, kept, Evidence())
    assert sum(shares[x.name].cost(x) for x in layers) <= budget_of(layers, kept)
    bases = {x.name: Share(None, bits=bits).cost(x) for x in layers}
    left = budget_of(layers, kept) - sum(bases.values())
    part = left / sum(x.dense_cost for x in layers)
    for layer in layers:
        share, base = shares[layer.name], bases[layer.name]
        assert share.rank is not None and (share.bits, share.correction) == (bits, correction)
        own = min(affordable(part, layer.dense_cost), layer.dense_cost - 1 - base)
        assert share.rank == 0 or share.cost(layer) <= base + own
        if share.rank < min(layer.out_features, layer.in_features) - 1:
            assert replace(share, rank=share.rank + 1).cost(layer) > base + own


@pytest.mark.parametrize("kept", [0.25, 0.4, 1.0])
@pytest.mark.parametrize("correction", [FULL, 4])
@pytest.mark.parametrize("form", ["plain", "pivot"])
def test_a_share_costs_what_is_stored_of_it(kept: float, correction: int, form: str) -> None:
    layer = LayerRef("x", 0, 40, 56, "x", form=form)
    share = Corrections(2, correction).allocate([layer], kept, Evidence())["x"]
    assert share.rank is not None and share.rank > 0
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 56, generator=generator, dtype=torch.float64)
    coding = Coding(2, widths=tuple((slot, correction) for slot in FACTORS))
    moment = torch.eye(56, dtype=torch.float64)
    parts = code_layer(of_whole(weight, share.rank), moment, coding, form, torch.float32)
    packed = pack_layer(parts, torch.float32, layer.dense_cost, own=True, form=form)
    assert packed.attrs["numbers"] == share.cost(layer)
    assert pays(40, 56, packed.attrs["entry"])


@pytest.mark.parametrize("bits", [2, 4])
def test_a_budget_that_holds_no_base_is_refused_with_one_that_does(bits: int) -> None:
    allocator, layers = Corrections(bits), layers_of([(37, 41), (50, 30), (64, 32)])
    with pytest.raises(BudgetError, match=rf"in {bits} bits, which take 0\.\d{{4}} of") as refusal:
        allocator.check(layers, 0.1)
    needed = float(str(refusal.value).partition("which take ")[2].split()[0])
    allocator.check(layers, needed)
    with pytest.raises(BudgetError):
        allocator.check(layers, needed - 2e-4)


def test_bits_are_those_that_codes_have() -> None:
    with pytest.raises(ConfigError, match="a base is in codes of 8, 6, 5, 4, 3, 2 bits, got 16"):
        Corrections(16)
    with pytest.raises(ConfigError, match="8, 6, 5, 4, 3, 2 bits or in 16, got 7"):
        Corrections(2, 7)
