"""Settings that nothing would read: each says in its field who reads it, and here is who that is.

What was meant otherwise than it works is refused; what merely has no effect, such as the number of
calibration windows of a method that reads none, people are told.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from compress_core.errors import ConfigError
from compress_core.hf.documents import has_fields
from compress_core.method import Method
from compress_core.methods import Variant, build_method, option_defaults, parse_variant
from compress_core.options import read_option
from flows.settings.belonging import belonging
from flows.settings.config import FLAGS, Settings
from flows.settings.fields import BLOCKS, EXTRAS, HERE, Recover


@dataclass(frozen=True)
class Use:
    """A command's settings and its methods, by what the user called them."""

    settings: Settings
    methods: Mapping[str, Method]

    @property
    def calibrates(self) -> bool:
        """Whether anything reads calibration windows."""
        needed = any(method.needs_calibration for method in self.methods.values())
        return needed or self.settings.recover is not None

    @property
    def holds_out(self) -> bool:
        """Whether the calibration text is evaluated on, too."""
        return self.settings.calibration is not None and not self.settings.eval_text

    @property
    def first(self) -> str:
        """The first method, for messages."""
        return repr(next(iter(self.methods)))


@dataclass(frozen=True)
class Reader:
    """Who reads some settings.

    Attributes:
        there: Whether it is there.
        without: What is said of a setting where it is not.
        refused: Whether such a setting is refused, or people are told only.
    """

    there: Callable[[Use], bool]
    without: str
    refused: bool = True


READERS = {
    "recover": Reader(
        lambda use: use.settings.recover is not None,
        f"without --recover: say how, {' or '.join(get_args(Recover))}",
    ),
    "recovered text": Reader(
        lambda use: use.settings.recover not in (None, BLOCKS),
        "is of a training of the whole model: say --recover "
        f"{' or '.join(how for how in get_args(Recover) if how != BLOCKS)}",
    ),
    "learning": Reader(
        lambda use: any(method.learn for method in use.methods.values()),
        "is of methods that train on the whole model; {first} does not",
    ),
    "other processes": Reader(
        lambda use: use.settings.runner != HERE,
        "without --runner: say whose processes, processes, dask or ray",
    ),
    "a cluster": Reader(
        lambda use: use.settings.runner in EXTRAS,
        "is of --runner dask or ray: say which",
    ),
    "kept": Reader(
        lambda use: getattr(use.settings, "kept", None) is not None,
        "says what --kept is measured on: there is none",
    ),
    "tasks": Reader(
        lambda use: bool(use.settings.tasks), "without --tasks: say which tasks to run"
    ),
    "eval_text": Reader(
        lambda use: bool(use.settings.eval_text), "without --eval-text: say of which text"
    ),
    "calibration": Reader(
        lambda use: use.settings.calibration is not None and (use.calibrates or use.holds_out),
        "without --calibration, or with one that nothing reads: say of which text",
    ),
    "a text": Reader(
        lambda use: use.settings.calibration is not None or bool(use.settings.eval_text),
        "without a text: give --calibration or --eval-text",
    ),
    "calibrating": Reader(
        lambda use: use.calibrates or use.holds_out,
        "{first} needs no calibration, and --eval-text is given",
        refused=False,
    ),
    "sampling": Reader(
        lambda use: use.calibrates,
        "{first} needs no calibration windows",
        refused=False,
    ),
    "moments": Reader(
        lambda use: any(
            m.reads_inputs or m.sequential or m.two_sided is not None for m in use.methods.values()
        ),
        "{first} measures no inputs",
        refused=False,
    ),
    "texts": Reader(
        lambda use: bool(use.settings.eval_text) or use.holds_out,
        "there is no text to evaluate on",
        refused=False,
    ),
    "windows": Reader(
        lambda use: use.calibrates or use.holds_out or bool(use.settings.eval_text),
        "there is no text",
        refused=False,
    ),
}


def check_idle(settings: Settings, methods: Mapping[str, Method]) -> None:
    """Refuses settings that nothing would read.

    Args:
        settings: Of the command.
        methods: Built, by what the user called them.

    Raises:
        ConfigError: One is there.
    """
    use = Use(settings, methods)
    for reader, flags in _unread(use, refused=True).items():
        raise ConfigError(f"{flags[0]} {READERS[reader].without.format(first=use.first)}")
    _check_fields(settings)
    _check_overridden(use)


def idle_notes(settings: Settings, methods: Mapping[str, Method]) -> list[str]:
    """What people should know of settings that have no effect: a sentence per reader, and one of
    stack-of-batch that averages nothing.
    """
    use = Use(settings, methods)
    unread = [
        f"{', '.join(flags)}: no effect, {READERS[reader].without.format(first=use.first)}"
        for reader, flags in _unread(use, refused=False).items()
    ]
    return unread + _stacking(use)


def _stacking(use: Use) -> list[str]:
    """Methods whose stack-of-batch calibration has no more windows than buckets."""
    found = {
        name: method.prefix.buckets
        for name, method in use.methods.items()
        if method.sequential and use.settings.samples <= method.prefix.buckets
    }
    if not found:
        return []
    return [
        f"{', '.join(found)}: stack-of-batch averages nothing, there is a bucket for each of "
        f"{use.settings.samples} windows; the paper has --samples 256, buckets here are "
        f"{max(found.values())}"
    ]


def _unread(use: Use, *, refused: bool) -> dict[str, list[str]]:
    """Readers that are not there, and flags of theirs that were given."""
    found: dict[str, list[str]] = {}
    for name, field in type(use.settings).model_fields.items():
        word = belonging(field).reader
        reader = READERS.get(word)
        if reader is None or reader.refused != refused or reader.there(use):
            continue
        if getattr(use.settings, name) != field.get_default(call_default_factory=True):
            found.setdefault(word, []).append("--" + name.replace("_", "-"))
    return found


def _check_fields(settings: Settings) -> None:
    """Refuses the name of a field for texts that have none.

    Raises:
        ConfigError: All texts that it is for are plain.
    """
    given = {
        "calibration": [settings.calibration] if settings.calibration else [],
        "eval": settings.eval_text,
    }
    for kind, texts in given.items():
        field = getattr(settings, f"{kind}_field")
        if field is not None and not any(has_fields(text) for text in texts):
            raise ConfigError(
                f"--{kind}-field {field}: {', '.join(texts)} is plain text, which has no fields; "
                "leave it out"
            )


def _check_overridden(use: Use) -> None:
    """Refuses an allocator or options that no method takes, since each says its own.

    Raises:
        ConfigError: There is one, or an option changes nothing about the method it is given to.
    """
    settings = use.settings
    variants = {name: parse_variant(name) for name in use.methods}
    if settings.allocate is not None and all(v.allocate for v in variants.values()):
        raise ConfigError(
            f"--allocate {settings.allocate}: {use.first} names its own allocator; leave one out"
        )
    for flag in FLAGS:
        if flag in settings.options:
            raise ConfigError(f"--option {flag}={settings.options[flag]}: give --{flag}")
        if (given := getattr(settings, flag)) is not None:
            _check_flag(use, variants, flag, given)
    for option in settings.options:
        if all(option in variant.options for variant in variants.values()):
            raise ConfigError(
                f"--option {option}: {use.first} says its own {option}; leave one out"
            )
    for name, variant in variants.items():
        for option, value in {**settings.options, **variant.options}.items():
            if not _tells(settings, name, option):
                raise ConfigError(
                    f"option {option}={value} of {name!r} changes nothing beside the others: "
                    f"leave it out; `eigenpress methods {variant.name}` says what reads it"
                )


def _check_flag(use: Use, variants: Mapping[str, Variant], flag: str, given: Any) -> None:
    """Refuses a flag that every method contradicts, or that those that don't have nothing for.

    Raises:
        ConfigError: It is one.
    """
    own = {name: variant.options.get(flag) for name, variant in variants.items()}
    if all(value is not None and str(value) != str(given) for value in own.values()):
        raise ConfigError(f"--{flag} {given}: {use.first} says its own {flag}; leave one out")
    heard = [name for name, value in own.items() if value is None]
    if heard and not any(_tells(use.settings, name, flag) for name in heard):
        raise ConfigError(f"--{flag} {given} changes nothing about {heard[0]!r}: leave it out")


def _tells(settings: Settings, name: str, option: str) -> bool:
    """Whether an option of a method, from wherever it is said, is its default or changes it."""
    variant = parse_variant(name)
    flags = {flag: getattr(settings, flag) for flag in FLAGS}
    said = {flag: value for flag, value in flags.items() if value is not None}
    options: dict[str, Any] = {**said, **settings.options, **variant.options}
    rest = {key: value for key, value in options.items() if key != option}
    allocate = variant.allocate or settings.allocate

    default = option_defaults(variant.name, allocate)[option]
    if read_option(f"method {name!r}", option, options[option], default) == default:
        return True
    try:
        without = build_method(variant.name, rest, allocate).essence
    except ConfigError:  # it cannot be left out alone
        return True
    return build_method(variant.name, options, allocate).essence != without
