"""What a run is asked to do: every flag of the command line, as one validated object.

The same fields, in the same words, are flags, keys of a ``--config`` YAML file, and the form that
Prefect shows for a deployment. ``Belongs`` says of each where it stands in help and who reads it.
"""

import math
import os
import reprlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self, TypeVar

from pydantic import (
    ByteSize,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from compress_core.errors import ConfigError
from compress_core.forms.names import BITS, FORM
from compress_core.metric_names import METRIC
from compress_core.types import Budget
from flows.settings.belonging import BUDGET, METHOD, METHOD_WORD, OUTPUT, Belongs
from flows.settings.fields import MOST, MOST_BYTES, Fields
from flows.settings.reading import file_and_flags, one_line
from flows.settings.words import check_value
from storage.errors import StorageError
from storage.objects import parse_address

if TYPE_CHECKING:
    from compress_core.recover.settings import Recovery


DEFAULT_METHOD = "press"
"""The method where none is named."""
FLAGS = (FORM, METRIC, BITS)
"""Flags that are options of every method; None leaves each method what is its own."""
MADE_BY: dict[str, Any] = {"rank_multiple": 1} | dict.fromkeys(FLAGS)
"""Settings that make a method beside its own, as it is built, and what older runs had of each."""


class Settings(Fields):
    """What a run and a sweep have in common, and what of it is refused."""

    def runs(self) -> "list[RunConfig]":
        """The runs that are asked for, in order."""
        return []  # of settings alone; both kinds of command have some

    @property
    def made_by(self) -> tuple[Any, ...]:
        """What makes a method beside its own name, options and allocator."""
        return tuple(getattr(self, name) for name in MADE_BY)

    @property
    def recovery(self) -> "Recovery | None":
        """How the compressed model is trained on, in every step of ``recover``; None: it is not."""
        if self.recover is None:
            return None
        from compress_core.recover.settings import Recovery  # not for --help: it brings torch

        return Recovery(
            "lora" if self.recover == "lora" else "factors",
            steps=self.recover_steps,
            held_back=self.recover_held_back,
            text=self.recover_text,
            seed=self.seed if self.recover_seed is None else self.recover_seed,
        )

    @field_validator("*", mode="before")
    @classmethod
    def _check_words(cls, value: Any, info: ValidationInfo) -> Any:
        name = info.field_name or ""
        boolean = name == "options" or cls.model_fields[name].annotation is bool
        check_value(name, value, boolean=boolean)
        return value

    @field_validator("batch_size", mode="before")
    @classmethod
    def _check_batch_size(cls, asked: Any) -> Any:
        number = str(asked) if len(str(asked)) < 20 else ""
        if asked == "auto" or (number.isdecimal() and 1 <= int(number) <= MOST):
            return asked
        raise ConfigError(
            f"batch_size: it is auto or a whole number above 0 and up to {MOST:,}, "
            f"got {reprlib.repr(asked)}"
        )

    @field_validator("skip_bad_rows")
    @classmethod
    def _check_skip_bad_rows(cls, asked: float) -> float:
        if asked >= 1 and not asked.is_integer():
            raise ConfigError(f"skip_bad_rows: it is a count or a share below 1, got {asked:g}")
        return asked

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str | None) -> str | None:
        if name is not None and ("/" in name or ":" in name):
            raise ConfigError(f"name {name!r} cannot be registered: it holds '/' or ':'")
        return name

    @field_validator("store")
    @classmethod
    def _check_store(cls, address: str | None) -> str | None:
        try:
            if address is not None:
                parse_address(address)
        except StorageError as error:
            raise ConfigError(f"store: {error}") from None
        return address

    @model_validator(mode="after")
    def _check_twice(self) -> Self:
        for name in type(self).model_fields:
            values = getattr(self, name)
            if isinstance(values, list):
                same = [os.path.realpath(v) if os.path.exists(str(v)) else v for v in values]
                twice = next((v for v, s in zip(values, same, strict=True) if same.count(s) > 1), 0)
                if twice:
                    raise ConfigError(f"{name}: {twice!r} is there twice; once is enough")
        return self

    @model_validator(mode="after")
    def _check_home(self) -> Self:
        model, home = (os.path.realpath(Path(p).expanduser()) for p in (self.model, self.home))
        if os.path.isdir(model) and Path(home).is_relative_to(model):
            raise ConfigError(
                f"the data directory {self.home} is inside the model's folder; choose another with "
                "--home or EIGENPRESS_HOME"
            )
        return self


class RunConfig(Settings):
    """One method at one budget."""

    method: Annotated[str, Belongs(METHOD, word=METHOD_WORD)] = Field(
        DEFAULT_METHOD,
        description="one of `eigenpress methods`, as METHOD[@ALLOCATOR][:OPTION=VALUE]...",
    )
    kept: Annotated[float | None, Belongs(BUDGET, word="SHARE")] = Field(
        None, description="share of parameters that stays, in (0, 1]; this or a target"
    )
    target_bytes: Annotated[ByteSize | None, Belongs(BUDGET, word="SIZE")] = Field(
        None,
        le=MOST_BYTES,
        description="bytes of the compressed weights, like 1.5GB, in place of --kept",
    )
    target_perplexity: Annotated[float | None, Belongs(BUDGET)] = Field(
        None, description="perplexity on the first text to stay within, in place of --kept"
    )
    output: Annotated[Path | None, Belongs(OUTPUT, word="DIR")] = Field(
        None, description="where the model folder goes"
    )

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        given = [
            name
            for name in ("kept", "target_bytes", "target_perplexity")
            if getattr(self, name) is not None
        ]
        if len(given) != 1:
            said = " and ".join("--" + name.replace("_", "-") for name in given)
            raise ConfigError(
                f"{said + ' are two budgets' if said else 'kept is missing'}: give one of --kept, "
                "--target-bytes and --target-perplexity (or `kept:` in --config)"
            )
        if self.kept is not None:
            Budget(self.kept, self.of)
        if self.target_perplexity is not None and not 1 < self.target_perplexity < math.inf:
            raise ConfigError(
                f"--target-perplexity is a number above 1, got {self.target_perplexity:g}"
            )
        return self

    def runs(self) -> "list[RunConfig]":
        """Itself, the only one."""
        return [self]

    @property
    def label(self) -> str:
        """The method as people see it, with the allocator and the recovery that were asked for.

        What a flag says is in it where the method by itself is otherwise.
        """
        from compress_core.methods import METHODS, option_defaults  # not for --help: brings torch

        name, colon, options = self.method.partition(":")
        known = name.partition("@")[0]  # or else refused, and not here
        own = option_defaults(known) if known in METHODS else {}
        if self.allocate is not None and "@" not in name:
            name = f"{name}@{self.allocate}"
        for flag in FLAGS:
            given = getattr(self, flag)
            if given not in (None, own.get(flag)) and flag not in _said_in(self.method):
                options, colon = f"{options}{colon and ':'}{flag}={given}", ":"
        recovery = f"+{self.recover}" if self.recover else ""
        return f"{name}{colon}{options}{recovery}"

    @property
    def known_kept(self) -> float:
        """``kept``, of a configuration whose target has been turned into it."""
        assert self.kept is not None
        return self.kept


def _said_in(method: str) -> list[str]:
    """Flags that a method's own words take the place of."""
    return [flag for flag in FLAGS if f":{flag}=" in method]


class SweepConfig(Settings):
    """Several methods, several budgets, one collection of activations."""

    methods: Annotated[list[str], Belongs(METHOD, word=METHOD_WORD)] = Field(
        min_length=1,
        description="one of `eigenpress methods`, as METHOD[@ALLOCATOR][:OPTION=VALUE]...",
    )
    kept: Annotated[list[float], Belongs(BUDGET, word="SHARE")] = Field(
        min_length=1, description="share of parameters that stays, in (0, 1]"
    )
    report: Annotated[Path | None, Belongs(OUTPUT, word="DIR")] = Field(
        None, description="where the table and the plot go"
    )

    @model_validator(mode="after")
    def _check_kept(self) -> Self:
        for kept in self.kept:
            Budget(kept, self.of)
        return self

    def runs(self) -> list[RunConfig]:
        """One run per method and budget, methods outermost; of flags only what a method heeds."""
        common = self.model_dump(exclude={"methods", "kept", "report"})
        return [
            RunConfig(**{**common, **dict.fromkeys(_said_in(method))}, method=method, kept=kept)
            for method in self.methods
            for kept in self.kept
        ]


T = TypeVar("T", bound=Settings)


def build_config(kind: type[T], given: dict[str, Any], file: Path | None) -> T:
    """The configuration of a YAML file, with what was given on the command line on top.

    Args:
        kind: RunConfig or SweepConfig.
        given: Flags that the user set; options of the method are set one by one.
        file: The YAML file, or None.

    Raises:
        ConfigError: The file cannot be read, or a value is unknown, missing or out of range.
    """
    try:
        return kind(**file_and_flags(given, file))
    except ValidationError as error:
        others = {name: word for word, k in KINDS.items() for name in k.model_fields}
        raise ConfigError(one_line(kind.model_fields, others, error, file)) from None


KINDS: dict[str, type[Settings]] = {"a run": RunConfig, "a sweep": SweepConfig}
