"""The table of methods, and the one way to build one from a name and options."""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from compress_core.allocate import DEVICE, allocator_options, build_allocator
from compress_core.errors import ConfigError
from compress_core.forms.names import BITS, CODE_GROUP, FORM, ROUNDING
from compress_core.method import Method
from compress_core.methods.ada_svd import ada_svd
from compress_core.methods.asvd import asvd
from compress_core.methods.basis_sharing import basis_sharing
from compress_core.methods.caldera import caldera
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
from compress_core.metric_names import METRIC, METRIC_DAMP
from compress_core.of_all import OF_ALL, as_asked, check_divisible, stepped
from compress_core.options import OptionValue, nearest, read_option

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
    "press": press,
    "wanda": wanda,
    "sparsegpt": sparsegpt,
    "oats": oats,
    "slim": slim,
    "hassle_free": hassle_free,
    "rtn": rtn,
    "gptq": gptq,
    "caldera": caldera,
    "cap": cap,
    "soco": soco,
    "dobi_svd": dobi_svd,
}

OPTION = r":([^:=]+)=([^:]+(?::\d+)?)(?=:|$)"  # a value may be of the form 2:4


KINDS = ("entries", "columns")
"""Options of what layers may be of: an allocator sells it, and a method makes it."""

WITH = {METRIC: {METRIC_DAMP}, BITS: {CODE_GROUP, ROUNDING}}
"""Options that are read beside another one, and so go where that one is a method's own."""


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
    factors: str | None = None,
    metric: str | None = None,
    bits: int | None = None,
) -> Method:
    """The method that ``text`` names, each option at the paper's default unless given.

    What is None is not said, and as the method has it by itself.

    Args:
        text: A key of ``METHODS``, or a :class:`Variant` in text.
        options: Keyword arguments of the method's function, or fields of the allocator where one
            is named; text is read as the default's type. What ``text`` itself says comes first.
        allocate: A key of ``ALLOCATORS``, in place of the method's own allocator.
        multiple: What every rank is to be a multiple of.
        factors: How products of low rank are stored, one of ``FACTORS``; ``text`` may say it as an
            option.
        metric: What weighs errors, one of ``METRIC_NAMES``; ``text`` may say it as an option.
        bits: Of every number that is stored: ``FULL``, or one of ``WIDTHS`` for codes; ``text`` may
            say it as an option.

    Raises:
        ConfigError: Unknown method, allocator or option, or a value of the wrong kind or range.
    """
    variant = parse_variant(text)
    name, allocate = variant.name, variant.allocate or allocate
    if name not in METHODS:
        hint = nearest(name, METHODS) or "."
        raise ConfigError(f"unknown method {name!r}{hint} Methods: {', '.join(METHODS)}")
    flags: dict[str, OptionValue | None] = {FORM: factors, METRIC: metric, BITS: bits}
    asked = {flag: value for flag, value in flags.items() if value is not None}
    values, of_allocator = _read_options(
        name, allocate, {**asked, **(options or {}), **variant.options}
    )
    of_all = _of_all(name)
    said = {option: values.pop(option) for option in of_all if option in values}
    device = str(of_allocator.pop(DEVICE, ""))
    method = METHODS[name](**values)
    if allocate is not None:
        method = _with_allocator(method, name, values, allocate, of_allocator)
    return stepped(as_asked(method, of_all, said), multiple, device)


def _with_allocator(
    method: Method,
    name: str,
    values: Mapping[str, Any],
    allocate: str,
    of_allocator: Mapping[str, OptionValue],
) -> Method:
    """The method with an allocator in the place of its own.

    Raises:
        ConfigError: It divides the budget itself, an option is of what is replaced, or the
            allocator gives what the method does not make.
    """
    check_divisible(method, allocate)
    allocator = build_allocator(allocate, of_allocator)
    for option, value in values.items():
        alone, default = METHODS[name](**{option: value}), METHODS[name]()
        if alone != default and replace(alone, allocate=default.allocate) == default:
            raise ConfigError(
                f"option {option!r} is of the allocator of {name!r}, which {allocate!r} replaces"
            )
    makers = {kind: getattr(method, kind) for kind in KINDS}
    for kind in KINDS:
        if kind not in allocator.reads:
            makers[kind] = None
        elif makers[kind] is None:
            raise ConfigError(
                f"method {name!r} makes no layer of {kind}, which allocator {allocate!r} would "
                f"give it: leave out {kind}=true"
            )
    return replace(method, allocate=allocator, **makers)


def _of_all(name: str) -> dict[str, OptionValue]:
    """Defaults of the options that every method has, but for those that this one has itself."""
    own = set(inspect.signature(METHODS[name]).parameters)
    for first, others in WITH.items():
        own |= others if first in own else set()
    return {option: default for option, (default, _) in OF_ALL.items() if option not in own}


def option_defaults(name: str, allocate: str | None = None) -> dict[str, Any]:
    """Options of a method, of every method, and of the allocator where one is named: defaults."""
    parameters = inspect.signature(METHODS[name]).parameters
    own = {option: parameter.default for option, parameter in parameters.items()}
    own |= _of_all(name)
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
        if option in defaults and (option not in for_allocator or option in KINDS):
            values[option] = read_option(f"method {name!r}", option, value, defaults[option])
        elif option not in for_allocator:
            known = [*defaults, *for_allocator]
            raise ConfigError(
                f"method {name!r} has no option {option!r}; its options: "
                f"{', '.join(known) or 'none'}{nearest(option, known)}"
            )
    return values, of_allocator
