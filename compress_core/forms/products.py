"""The forms in which a product of low rank is stored, and what each rank of it then costs."""

from functools import lru_cache
from typing import Any

from compress_core.forms.eight_bits import BITS, EightBits
from compress_core.forms.factors import Factors
from compress_core.forms.kinds import in_codes, numbers_of, sizes_of
from compress_core.forms.names import AUTO, EIGHT_BITS, FULL, GROUP, PLAIN
from compress_core.forms.part import Kind
from compress_core.forms.pivot import Pivot

FORMS: dict[str, tuple[tuple[type[Kind], dict[str, Any]], ...]] = {
    PLAIN: ((Factors, {}),),
    "pivot": ((Pivot, {"pivot": True}),),
    AUTO: ((Factors, {}), (Pivot, {"pivot": True})),
    EIGHT_BITS: ((EightBits, {"bits": BITS}),),
}
"""A form's name to the kinds that it may take, with what an entry says of them."""


def product_form(
    form: str, rank: int, out_features: int, in_features: int, columns: int = 0
) -> tuple[type[Any], dict[str, Any]]:
    """The kind that takes fewest numbers for a rank, and its entry."""
    if rank == 0 and form != EIGHT_BITS:
        form = PLAIN  # of nothing there is nothing to hold in another form
    entries = [(kind, {"rank": rank, **says}) for kind, says in FORMS[form]]
    sizes = sizes_of(out_features, in_features, {"columns": columns})
    return min(entries, key=lambda found: found[0].numbers(found[1], sizes))


@lru_cache(maxsize=1 << 16)
def rank_cost(
    form: str,
    rank: int,
    out_features: int,
    in_features: int,
    columns: int = 0,
    bits: int = FULL,
    group: int = GROUP,
) -> int:
    """Numbers that a product of a rank takes; of codes, numbers of 16 bits in as much room."""
    _, entry = product_form(form, rank, out_features, in_features, columns)
    sizes = sizes_of(out_features, in_features, {"columns": columns})
    return numbers_of(in_codes(entry, sizes, bits, group), sizes)


@lru_cache(maxsize=1 << 16)
def kept_cost(
    form: str,
    rank: int,
    columns: int,
    out_features: int,
    in_features: int,
    bits: int = FULL,
    group: int = GROUP,
) -> int:
    """As :func:`rank_cost`, with columns that are kept beside the product, and their index."""
    if columns == 0:
        return rank_cost(form, rank, out_features, in_features, 0, bits, group)
    _, entry = product_form(form, rank, out_features, in_features, columns)
    sizes = sizes_of(out_features, in_features, {"columns": columns})
    return numbers_of(in_codes({**entry, "columns": columns}, sizes, bits, group), sizes)


@lru_cache(maxsize=1 << 16)
def entries_cost(
    nonzeros: int, out_features: int, in_features: int, bits: int, group: int = GROUP
) -> int:
    """Numbers that entries take; of codes, numbers of 16 bits in as much room. Places: none."""
    if bits == FULL or not nonzeros:
        return nonzeros
    sizes = sizes_of(out_features, in_features, {})
    return numbers_of(in_codes({"rank": 0, "nonzeros": nonzeros}, sizes, bits, group), sizes)


@lru_cache(maxsize=1 << 12)
def whole_cost(out_features: int, in_features: int, bits: int, group: int = GROUP) -> int:
    """Numbers of 16 bits that a dense weight in codes takes the room of."""
    sizes = sizes_of(out_features, in_features, {})
    return numbers_of(in_codes({"rank": 0, "base": True}, sizes, bits, group), sizes)


@lru_cache(maxsize=1 << 12)
def largest_rank(
    form: str,
    numbers: int,
    out_features: int,
    in_features: int,
    bits: int = FULL,
    group: int = GROUP,
) -> int:
    """The largest rank that takes no more than some numbers; costs rise with the rank."""
    low, high = 0, min(out_features, in_features)
    while low < high:
        middle = (low + high + 1) // 2
        cost = rank_cost(form, middle, out_features, in_features, 0, bits, group)
        low, high = (middle, high) if cost <= numbers else (low, middle - 1)
    return low
