"""The table of methods, and the one way to build one from a name and options."""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from compress_core.allocate import DEVICE, allocator_options, build_allocator
from compress_core.allocate.entries import Entries
from compress_core.allocate.stepped import Stepped
from compress_core.decompose import ProjectOutputs
from compress_core.errors import ConfigError
from compress_core.forms.names import EIGHT_BITS, FACTORS, FORM, PLAIN
from compress_core.method import Method
from compress_core.methods.ada_svd import ada_svd
from compress_core.methods.asvd import asvd
from compress_core.methods.basis_sharing import basis_sharing
from compress_core.methods.cap import cap
from compress_core.methods.dobi_svd import dobi_svd
from compress_core.methods.duo_svd import duo_svd
from compress_core.methods.fwsvd import fwsvd
from compress_core.methods.gptq import gptq
from compress_core.methods.hassle_free import hassle_free
from compress_core.methods.oats import oats
from compress_core.methods.press import press
from compress_core.methods.rtn import rtn
from compress_core.methods.saes_svd import saes_svd
from compress_core.methods.slim import slim
from compress_core.methods.soco import soco
from compress_core.methods.sparsegpt import sparsegpt
from compress_core.methods.svd import svd
from compress_core.methods.svd_llm import svd_llm
from compress_core.methods.svd_llm_v2 import svd_llm_v2
from compress_core.methods.wanda import wanda
from compress_core.metric_names import INPUTS, METRIC, METRIC_DAMP, METRIC_NAMES
from compress_core.options import OptionValue, nearest, one_of, read_option
from compress_core.refine.columns import PreserveColumns
from compress_core.two_sided import TwoSided

METHODS: dict[str, Callable[..., Method]] = {
    "svd": svd,
    "fwsvd": fwsvd,
    "asvd": asvd,
    "svd_llm": svd_llm,
    "svd_llm_v2": svd_llm_v2,
    "ada_svd": ada_svd,
    "duo_svd": duo_svd,
    "saes_svd": saes_svd,
    "basis_sharing": basis_sharing,
    "wanda": wanda,
    "sparsegpt": sparsegpt,
    "oats": oats,
    "slim": slim,
    "hassle_free": hassle_free,
    "cap": cap,
    "rtn": rtn,
    "gptq": gptq,
    "press": press,
    "soco": soco,
    "dobi_svd": dobi_svd,
}

OF_ALL: dict[str, tuple[OptionValue, str]] = {
    FORM: (
        PLAIN,
        "how a product of low rank is stored: plain, pivot, or auto, the smaller of both",
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
}
"""Options of every method: default, and what people are told of it."""
OPTION = r":([^:=]+)=([^:]+(?::\d+)?)(?=:|$)"  # a value may be of the form 2:4


@dataclass(frozen=True)
class Variant:
    """A method with its options and allocator, as one word: ``duo_svd@uniform:search=grid``.

    Attributes:
        name: A key of ``METHODS``.
        allocate: A key of ``ALLOCATORS``; None for the method's own.
        options: Of the method, and of the allocator where one is named.
    """

    name: str
    allocate: str | None
    options: Mapping[str, OptionValue]


def parse_variant(text: str) -> Variant:
    """Reads ``method[@allocator][:option=value]...``.

    Raises:
        ConfigError: It is not of that form.
    """
    head = text.partition(":")[0]
    name, _, allocate = head.partition("@")
    pairs = re.findall(OPTION, text[len(head) :])
    whole = re.fullmatch(f"(?:{OPTION})*", text[len(head) :])
    options = dict(pairs)
    if whole is None or len(options) < len(pairs) or not name or head.endswith("@"):
        raise ConfigError(
            f"{text!r} is not method[@allocator][:option=value]..., "
            "for instance duo_svd@uniform:refit_columns=true"
        )
    return Variant(name, allocate or None, options)


def build_method(
    text: str,
    options: Mapping[str, OptionValue] | None = None,
    allocate: str | None = None,
    multiple: int = 1,
    factors: str = PLAIN,
    metric: str = INPUTS,
) -> Method:
    """The method that ``text`` names, each option at the paper's default unless given.

    Args:
        text: A key of ``METHODS``, or a :class:`Variant` in text.
        options: Keyword arguments of the method's function, or fields of the allocator where one
            is named; text is read as the default's type. What ``text`` itself says comes first.
        allocate: A key of ``ALLOCATORS``, in place of the method's own allocator.
        multiple: What every rank is to be a multiple of.
        factors: How products of low rank are stored, one of ``FACTORS``; ``text`` may say it as an
            option.
        metric: What weighs errors, one of ``METRIC_NAMES``; ``text`` may say it as an option.

    Raises:
        ConfigError: Unknown method, allocator or option, or a value of the wrong kind or range.
    """
    variant = parse_variant(text)
    name, allocate = variant.name, variant.allocate or allocate
    if name not in METHODS:
        hint = nearest(name, METHODS) or "."
        raise ConfigError(f"unknown method {name!r}{hint} Methods: {', '.join(METHODS)}")
    given = {FORM: factors, METRIC: metric, **(options or {}), **variant.options}
    values, of_allocator = _read_options(name, allocate, given)
    of_all = {option: values.pop(option, default) for option, (default, _) in OF_ALL.items()}
    method = _stored_as(METHODS[name](**values), of_all[FORM])
    method = _measured_in(method, of_all[METRIC], of_all[METRIC_DAMP])
    device = str(of_allocator.pop(DEVICE, ""))
    if allocate is None:
        return _stepped(method, multiple, device)
    _check_divisible(method, allocate)
    allocator = build_allocator(allocate, of_allocator)
    for option, value in values.items():
        alone, default = METHODS[name](**{option: value}), METHODS[name]()
        if alone != default and replace(alone, allocate=default.allocate) == default:
            raise ConfigError(
                f"option {option!r} is of the allocator of {name!r}, which {allocate!r} replaces"
            )
    return _stepped(replace(method, allocate=allocator), multiple, device)


def option_defaults(name: str, allocate: str | None = None) -> dict[str, Any]:
    """Options of a method, of every method, and of the allocator where one is named: defaults."""
    parameters = inspect.signature(METHODS[name]).parameters
    own = {option: parameter.default for option, parameter in parameters.items()}
    own |= {option: default for option, (default, _) in OF_ALL.items()}
    allocator = build_allocator(allocate) if allocate else None
    return own | {
        o: getattr(allocator, o, "") for o in (allocator_options(allocate) if allocate else [])
    }


def _read_options(
    name: str, allocate: str | None, given: Mapping[str, OptionValue]
) -> tuple[dict[str, Any], dict[str, OptionValue]]:
    """Options of a method, each as the type of its default, and those of the allocator as given.

    Raises:
        ConfigError: An option of neither, or a value of the wrong kind.
    """
    defaults = option_defaults(name)
    for_allocator = allocator_options(allocate) if allocate else []
    values, of_allocator = {}, {}
    for option, value in given.items():
        if option in for_allocator:
            of_allocator[option] = value
        elif option in defaults:
            values[option] = read_option(f"method {name!r}", option, value, defaults[option])
        else:
            known = [*defaults, *for_allocator]
            raise ConfigError(
                f"method {name!r} has no option {option!r}; its options: "
                f"{', '.join(known) or 'none'}{nearest(option, known)}"
            )
    return values, of_allocator


def _measured_in(method: Method, metric: str, damp: float) -> Method:
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


def _stored_as(method: Method, factors: str) -> Method:
    """The method with its products of low rank stored as asked.

    Raises:
        ConfigError: There is no such form, or the method's products have one of their own.
    """
    one_of(f"method {method.name!r}", FORM, factors, FACTORS)
    if factors == PLAIN:
        return method
    if isinstance(method.allocate, Entries) and not method.allocate.gives_ranks:
        return method  # nothing of it is of low rank
    if method.form != PLAIN:
        raise ConfigError(f"method {method.name!r} stores its factors in {method.form}: give plain")
    if method.learn is not None:
        if factors == "auto":
            return method
        raise ConfigError(
            f"method {method.name!r} learns at the price of plain factors: leave out "
            f"{FORM}={factors}"
        )
    fit = method.fit
    if isinstance(fit, PreserveColumns):
        fit = replace(fit, form=factors)
    return replace(method, form=factors, fit=fit)


def _stepped(method: Method, multiple: int, device: str) -> Method:
    """The method with ranks that a device likes.

    Raises:
        ConfigError: It chooses its ranks itself.
    """
    if multiple == 1 and not device:
        return method
    if device and method.form not in (PLAIN, EIGHT_BITS):
        raise ConfigError(
            f"option device={device} knows speeds of plain factors: leave out {FORM}={method.form}"
        )
    what = f"--rank-multiple {multiple}" if multiple != 1 else f"option device={device}"
    how = "learns its ranks" if method.learn else "prunes" if method.prunes else ""
    if isinstance(method.fit, PreserveColumns):
        how = "trades ranks for columns"
    if how:
        raise ConfigError(f"method {method.name!r} {how}: leave out {what}")
    return replace(method, allocate=Stepped(method.allocate, multiple, device))


def _check_divisible(method: Method, allocate: str) -> None:
    """Refuses an allocator for a method that divides the budget itself.

    Raises:
        ConfigError: It prunes, so that every layer keeps the same share, or it learns its shares.
    """
    if method.prunes or method.learn is not None:
        how = "learns its shares" if method.learn else "keeps the same share of every layer"
        raise ConfigError(f"method {method.name!r} {how}: leave out the allocator {allocate!r}")
