"""What a run is asked to do: every flag of the command line, as one validated object.

The same fields, in the same words, are flags, keys of a ``--config`` YAML file, and the form that
Prefect shows for a deployment.
"""

import difflib
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from compress_core.compute import Compute
from compress_core.errors import ConfigError
from compress_core.secrets import hide_all
from compress_core.types import Budget
from tasks.engine.stages import REFRESHABLE

if TYPE_CHECKING:
    from compress_core.recover.settings import Recovery

Option = bool | int | float | str
if TYPE_CHECKING:
    Stage = str
else:  # the table of stages says which there are
    Stage = Literal[REFRESHABLE]


def default_home() -> Path:
    """The data directory: EIGENPRESS_HOME, else ~/.eigenpress."""
    return Path(os.environ.get("EIGENPRESS_HOME") or "~/.eigenpress").expanduser()


MOST_SEED = 2**63 - 1  # that torch takes


class Settings(BaseModel):
    """What a run and a sweep have in common."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    model: str = Field(description="model folder or hub id")
    of: Literal["compressible", "model"] = Field(
        "compressible", description="what kept is measured on"
    )
    allocate: str | None = Field(
        None,
        description="how the budget is divided, see `eigenpress methods`; else as the method's "
        "paper does",
    )
    options: dict[str, Option] = Field(
        default_factory=dict, description="option of the method, or of --allocate"
    )
    recover: Literal["lora", "factors"] | None = Field(
        None, description="train what is stored on, towards the dense model: how"
    )
    recover_steps: int = Field(400, ge=1, description="steps of that training")
    recover_text: float = Field(
        0.2, ge=0, le=1, description="weight of the text itself in its loss, beside the dense model"
    )
    recover_held_back: float = Field(
        0.125, gt=0, le=0.5, description="share of calibration windows it only watches"
    )
    recover_seed: int | None = Field(None, ge=0, le=MOST_SEED, description="its seed; else --seed")
    learn_seed: int | None = Field(
        None, ge=0, le=MOST_SEED, description="seed of a method's own training; else --seed"
    )
    calibration: str | None = Field(None, description="text to calibrate on: file or dataset id")
    calibration_field: str | None = Field(None, description="column that holds the text")
    samples: int = Field(256, ge=1, description="calibration windows")
    length: int = Field(2048, ge=8, description="tokens per window, clipped to the model's context")
    seed: int = Field(3, ge=0, le=MOST_SEED, description="seed of every random choice")
    bos: bool = Field(False, description="begin calibration windows with the tokenizer's bos")
    products: Literal["float64", "float32"] = Field(
        "float64", description="dtype of one batch's statistics; sums are always float64"
    )
    eval_text: list[str] = Field(
        default_factory=list,
        description="text to evaluate on; else a tenth of --calibration is held back",
    )
    eval_field: str | None = Field(None, description="column that holds evaluation text")
    eval_windows: int = Field(64, ge=0, description="evaluation windows per text; 0 is all")
    tasks: list[str] = Field(default_factory=list, description="lm-eval task")
    task_path: Path | None = Field(None, description="folder of local lm-eval task files")
    task_limit: int | None = Field(None, ge=1, description="documents per task")
    compute: Compute = Field(
        "auto",
        description="dtype the model runs in; auto is its own where the device multiplies it "
        "natively, else float32",
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    batch_size: Literal["auto"] | int = Field(
        "auto", description="windows per forward, a number or what free memory allows"
    )
    home: Path = Field(
        default_factory=default_home,
        description="data directory; else EIGENPRESS_HOME or ~/.eigenpress",
    )
    name: str | None = Field(None, description="name in the model registry")
    refresh: list[Stage] = Field(
        default_factory=list, description="stage to compute again even when cached"
    )
    trust_remote_code: bool = Field(False, description="let the model folder's own Python run")

    def runs(self) -> "list[RunConfig]":
        """The runs that are asked for, in order."""
        return []  # of settings alone; both kinds of command have some

    @property
    def recovery(self) -> "Recovery | None":
        """How the compressed model is trained on; None where it is not."""
        if self.recover is None:
            return None
        from compress_core.recover.settings import Recovery  # not for --help: it brings torch

        return Recovery(
            self.recover,
            steps=self.recover_steps,
            held_back=self.recover_held_back,
            text=self.recover_text,
            seed=self.seed if self.recover_seed is None else self.recover_seed,
        )

    @field_validator("batch_size", mode="before")
    @classmethod
    def _check_batch_size(cls, asked: Any) -> Any:
        if asked == "auto" or (str(asked).isdecimal() and int(asked) >= 1):
            return asked
        raise ConfigError(f"batch_size: it is auto or a whole number above 0, got {asked!r}")

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str | None) -> str | None:
        if name is not None and (not name.strip() or "/" in name or ":" in name):
            raise ConfigError(
                f"name {name!r} cannot be registered: it is empty or holds '/' or ':'"
            )
        return name


class RunConfig(Settings):
    """One method at one budget."""

    method: str = Field(
        "svd_llm", description="see `eigenpress methods`; method[@allocator][:option=value]..."
    )
    kept: float | None = Field(None, description="share of parameters that stays, in (0, 1]")
    target_bytes: ByteSize | None = Field(
        None, description="bytes of the compressed weights, like 1.5GB, in place of --kept"
    )
    target_perplexity: float | None = Field(
        None, description="perplexity on the first text to stay within, in place of --kept"
    )
    output: Path | None = Field(None, description="where the model folder goes")

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
        """The method as people see it, with the allocator and the recovery that were asked for."""
        name, colon, options = self.method.partition(":")
        if self.allocate is not None and "@" not in name:
            name = f"{name}@{self.allocate}"
        recovery = f"+{self.recover}" if self.recover else ""
        return f"{name}{colon}{options}{recovery}"

    @property
    def known_kept(self) -> float:
        """``kept``, of a configuration whose target has been turned into it."""
        assert self.kept is not None
        return self.kept


class SweepConfig(Settings):
    """Several methods, several budgets, one collection of activations."""

    methods: list[str] = Field(
        min_length=1, description="see `eigenpress methods`; method[@allocator][:option=value]..."
    )
    kept: list[float] = Field(min_length=1, description="share of parameters that stays, in (0, 1]")
    report: Path | None = Field(None, description="where the table and the plot go")

    @model_validator(mode="after")
    def _check_kept(self) -> Self:
        for kept in self.kept:
            Budget(kept, self.of)
        return self

    def runs(self) -> list[RunConfig]:
        """One run per method and budget, methods outermost."""
        common = self.model_dump(exclude={"methods", "kept", "report"})
        return [
            RunConfig(**common, method=method, kept=kept)
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
        raise ConfigError(_one_line(kind, error, file)) from None


def file_and_flags(given: dict[str, Any], file: Path | None) -> dict[str, Any]:
    """The settings of a YAML file with the flags on top; options of the method one by one.

    Raises:
        ConfigError: As :func:`read_yaml`.
    """
    values = read_yaml(file) if file else {}
    if isinstance(values.get("options"), dict) and "options" in given:
        given = given | {"options": values["options"] | given["options"]}
    return values | given


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: There is no such file or it does not hold a mapping.
    """
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read --config {file}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = " ".join(str(error).split())
        raise ConfigError(f"--config {file} is not YAML: {line}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--config {file} must hold a mapping of settings to values")
    return values


def write_yaml(config: BaseModel, file: Path) -> None:
    """Saves the resolved configuration, but for secrets, so that ``--config`` reads it back."""
    values = hide_all(config.model_dump(mode="json"))
    file.write_text(
        yaml.safe_dump(values, sort_keys=False, allow_unicode=True),
        encoding="utf-8",
    )


def _one_line(kind: type[Settings], error: ValidationError, file: Path | None) -> str:
    parts = []
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"]) or "configuration"
        if problem["type"] == "missing":
            parts.append(f"{name} is missing (--{name.replace('_', '-')} or `{name}:` in --config)")
        elif problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(name, kind.model_fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            parts.append(f"there is no setting called {name!r}{hint}")
        elif problem["type"] == "value_error":  # ours, a whole sentence
            parts.append(str(problem["ctx"]["error"]))
        else:
            parts.append(f"{name}: {problem['msg'].lower()}, got {problem['input']!r}")
    where = f" (with --config {file})" if file else ""
    return "; ".join(parts) + where
