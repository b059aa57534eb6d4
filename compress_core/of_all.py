"""What every method may be asked for, whatever it does: how its parts are stored and weighed."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from compress_core.allocate.entries import Entries
from compress_core.allocate.prices import Prices
from compress_core.allocate.stepped import Stepped
from compress_core.coding.settings import GPTQ, Coding
from compress_core.decompose import ProjectOutputs
from compress_core.errors import ConfigError
from compress_core.forms.names import (
    AUTO,
    BITS,
    CODE_GROUP,
    EIGHT_BITS,
    FACTORS,
    FORM,
    FULL,
    GROUP,
    PLAIN,
    ROUNDING,
    WIDTHS,
)
from compress_core.learn.soco import LearnSpectrum
from compress_core.method import Method
from compress_core.metric_names import INPUTS, METRIC, METRIC_DAMP, METRIC_NAMES
from compress_core.options import OptionValue, one_of
from compress_core.refine.columns import PreserveColumns
from compress_core.two_sided import TwoSided

OF_ALL: dict[str, tuple[OptionValue, str]] = {
    FORM: (
        AUTO,
        "how a product of low rank is stored: plain, two factors as in the papers, pivot, or auto, "
        "the smaller of both; what dobi_svd and cap learn, soco in codes, and what layers share, "
        "stays plain",
    ),
    METRIC: (
        INPUTS,
        "what weighs errors: inputs, as the method does, or two_sided, by what errors of a layer's "
        "outputs cost the model, too (its gradients are those of allocator fisher)",
    ),
    METRIC_DAMP: (
        TwoSided().damp,
        "of two_sided: part of the mean diagonal of the gradients' second moment that is added to "
        "it, above 0",
    ),
    BITS: (
        FULL,
        "of every number that is stored: 16, or 8, 6, 5, 4, 3 or 2 for codes, with a scale per "
        "group",
    ),
    CODE_GROUP: (GROUP, "codes that share a scale"),
    ROUNDING: (GPTQ, "how codes are found: gptq, in the metric of the inputs, or nearest"),
}
"""Options of every method: default, and what people are told of it."""


def as_asked(method: Method, defaults: Mapping[str, Any], said: Mapping[str, Any]) -> Method:
    """The method with what was asked for; what it has options of its own for stays as they say.

    Args:
        method: As its own options make it.
        defaults: Of the options that it has none of its own for.
        said: Those of them that were given, be it their default: that is meant, too.

    Raises:
        ConfigError: A value is none that there is, or the method cannot do it.
    """
    of_all = {**defaults, **said}
    _check_eight_bits(method, said)
    if FORM in of_all:
        method = stored_as(method, of_all[FORM])
    if METRIC in of_all:
        method = measured_in(method, of_all[METRIC], of_all[METRIC_DAMP])
    if BITS in of_all:
        method = rounded(method, said.get(BITS), of_all[CODE_GROUP], of_all[ROUNDING])
    _check_bits(method)
    return method


def _check_eight_bits(method: Method, said: Mapping[str, Any]) -> None:
    """Refuses to be told how factors are stored that are stored in 8 bits.

    Raises:
        ConfigError: Their form or their bits are said.
    """
    told = [f"{option}={said[option]}" for option in (FORM, BITS) if option in said]
    if method.form == EIGHT_BITS and told:
        raise ConfigError(
            f"method {method.name!r} stores its factors in 8 bits: leave out {told[0]}"
        )


def rounded(method: Method, bits: int | None, group: int, rounding: str) -> Method:
    """The method with its numbers in codes: of the bits that are asked for, or that its shares say.

    Args:
        method: As it is otherwise.
        bits: Of every code, ``FULL`` for none; None where its shares alone may say it.
        group: Codes that share a scale.
        rounding: How codes are found.

    Raises:
        ConfigError: The method stores what codes are not priced for, or cannot be bought in them.
    """
    chosen = _chooses_bits(method)
    coding = Coding(0 if bits == FULL else bits or 0, group, rounding)
    if bits == FULL or (bits is None and not chosen):
        return method
    how = "shares in-factors among layers" if method.sharing else ""
    if isinstance(method.learn, LearnSpectrum) and method.form == AUTO:
        method = stored_as(method, PLAIN)
    elif method.learn is not None and method.form not in (PLAIN, EIGHT_BITS):
        how = f"learns of codes at the price of plain factors ({FORM}={method.form})"
    if chosen and isinstance(method.fit, PreserveColumns):
        how = "trades ranks for columns at one price of numbers"
    if how:
        what = "the allocator 'prices'" if chosen else f"{BITS}={bits}"
        raise ConfigError(f"method {method.name!r} {how}: leave out {what}")
    fit = method.fit
    if isinstance(fit, PreserveColumns):
        fit = replace(fit, bits=coding.bits, group=group)
    return replace(method, coding=coding, fit=fit)


def _chooses_bits(method: Method) -> bool:
    """Whether each layer's share says how many bits its numbers have, beside its rank."""
    return isinstance(method.allocate, Prices) and method.allocate.codes


def _check_bits(method: Method) -> None:
    """Refuses bits that are said twice, and codes of which nothing says how many bits they have.

    Raises:
        ConfigError: They are, or nothing does.
    """
    coding, chosen = method.coding, _chooses_bits(method)
    said = FULL if coding is None else coding.bits
    if chosen and said:
        raise ConfigError(f"allocator 'prices' chooses bits itself: leave out {BITS}={said}")
    if not said and not chosen and not method.rounds:
        raise ConfigError(
            f"method {method.name!r} leaves bits to its own allocator, and this one chooses none: "
            f"give {BITS}={FULL}, or {', '.join(map(str, WIDTHS))} for codes"
        )


def measured_in(method: Method, metric: str, damp: float) -> Method:
    """The method with errors weighed as asked.

    Raises:
        ConfigError: There is no such metric, its damping is out of range, or the method does more
            than project outputs, layer by layer.
    """
    one_of(f"method {method.name!r}", METRIC, metric, METRIC_NAMES)
    two_sided = TwoSided(damp)
    if metric == INPUTS:
        return method
    how = "prunes" if method.prunes else "shares in-factors among layers" if method.sharing else ""
    how = "keeps the whole weight" if method.rounds else how
    if method.learn is not None:
        how = "learns what stays of each decomposition"
    elif not how and not isinstance(method.decompose, ProjectOutputs):
        how = "decomposes in a way of its own"
    if how:
        raise ConfigError(
            f"method {method.name!r} {how}, in the metric of the inputs alone: leave out "
            f"{METRIC}={metric}"
        )
    return replace(method, two_sided=two_sided)


def stored_as(method: Method, factors: str) -> Method:
    """The method with its products of low rank stored as asked.

    Raises:
        ConfigError: There is no such form, or the method's products have one of their own.
    """
    one_of(f"method {method.name!r}", FORM, factors, FACTORS)
    if isinstance(method.learn, LearnSpectrum):
        return replace(method, form=factors, learn=replace(method.learn, form=factors))
    if factors == PLAIN:
        return method
    alone = isinstance(method.allocate, Entries) and not method.allocate.gives_ranks
    if alone or (method.rounds and not method.corrects):
        return method  # nothing of it is of low rank
    if method.learn is not None:
        if factors == AUTO:
            return method
        raise ConfigError(
            f"method {method.name!r} learns at the price of plain factors: leave out "
            f"{FORM}={factors}"
        )
    fit = method.fit
    if isinstance(fit, PreserveColumns):
        fit = replace(fit, form=factors)
    return replace(method, form=factors, fit=fit)


def stepped(method: Method, multiple: int, device: str) -> Method:
    """The method with ranks that a device likes.

    Raises:
        ConfigError: It chooses its ranks itself, has none, or the device's speeds are not its own.
    """
    if multiple == 1 and not device:
        return method
    if device and method.coding is not None and method.coding.bits:
        raise ConfigError(
            f"option device={device} knows speeds of numbers that are in no codes: leave out "
            f"{BITS}={method.coding.bits}"
        )
    what = f"--rank-multiple {multiple}" if multiple != 1 else f"option device={device}"
    how = "learns its ranks" if method.learn else "prunes" if method.prunes else ""
    how = "keeps the whole weight" if method.rounds else how
    how = "buys ranks and bits from one list" if _chooses_bits(method) else how
    if isinstance(method.fit, PreserveColumns):
        how = "trades ranks for columns"
    if how:
        raise ConfigError(f"method {method.name!r} {how}: leave out {what}")
    if device and method.form not in (PLAIN, EIGHT_BITS):
        raise ConfigError(
            f"option device={device} knows speeds of plain factors alone: give {FORM}={PLAIN}"
        )
    return replace(method, allocate=Stepped(method.allocate, multiple, device))


def check_divisible(method: Method, allocate: str) -> None:
    """Refuses an allocator for a method that divides the budget itself.

    Raises:
        ConfigError: It prunes, so that every layer keeps the same share, or learns its shares, or
            keeps the whole weight.
    """
    if method.prunes or method.rounds or method.learn is not None:
        how = "learns its shares" if method.learn else "keeps the same share of every layer"
        how = "keeps the whole weight of every layer" if method.rounds else how
        raise ConfigError(f"method {method.name!r} {how}: leave out the allocator {allocate!r}")
