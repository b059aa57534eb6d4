"""What gates can be put on: each metric's name in a run, and which direction of it is better."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compress_core.errors import ConfigError
from compress_core.options import nearest
from tasks.tracking.limits import fit_name

LOWER, HIGHER = "lower", "higher"
TEXTS, TASKS, SPEED = "texts/", "tasks/", "speed/"
BYTES = ("bytes", "memory", "peak_bytes")  # whose limits may be sizes like 250MB
OF_TEXTS = ("perplexity", "kl", "nll")

PLAIN: dict[str, tuple[str, str | None, str]] = {
    "perplexity": ("compressed/perplexity", "dense/perplexity", LOWER),
    "kl": ("compressed/kl", None, LOWER),
    "bytes": ("bytes/compressed", "bytes/dense", LOWER),
    "memory": ("memory/compressed", "memory/dense", LOWER),
    "parameters": ("parameters/compressed", "parameters/dense", LOWER),
    "tokens_per_second": ("speed/decode_tokens_per_second", None, HIGHER),
    "prefill_tokens_per_second": ("speed/prefill_tokens_per_second", None, HIGHER),
    "first_token_seconds": ("speed/first_token_seconds", None, LOWER),
    "peak_bytes": ("speed/peak_bytes", None, LOWER),
    "decode_speedup": ("speed/decode_speedup", None, HIGHER),
    "prefill_speedup": ("speed/prefill_speedup", None, HIGHER),
}
"""Name in a gates file: name in the run, the dense model's there if it is measured, the better."""

SCORES = {
    LOWER: "perplexity word_perplexity byte_perplexity bits_per_byte brier_score ter wer cer",
    HIGHER: "acc acc_norm acc_mutual_info acc_all exact_match em f1 mcc bleu chrf rouge1 rouge2 "
    "rougeL rougeLsum pass@1 mc1 mc2 likelihood_diff prompt_level_strict_acc inst_level_strict_acc "
    "prompt_level_loose_acc inst_level_loose_acc",
}
"""lm-eval's own scores by the better direction; of others the gates file says it."""


@dataclass(frozen=True)
class Metric:
    """Something that a gate is put on.

    Attributes:
        name: As the gates file has it.
        logged: As the version's run has it.
        dense: As the run has the dense model's; None where that is not measured or says nothing.
        better: "lower" or "higher".
    """

    name: str
    logged: str
    dense: str | None
    better: str

    @property
    def standard_error(self) -> str | None:
        """As the run has its standard error, where it may have one."""
        return self._error(self.logged) if self.name.startswith(TASKS) else None

    def _error(self, _logged: str) -> str:
        score, comma, chain = self.name.removeprefix(TASKS).partition(",")
        return fit_name(f"compressed/{score}_stderr{comma}{chain}")

    @property
    def speed(self) -> bool:
        """Whether `eigenpress bench` measures it."""
        return self.logged.startswith(SPEED)


def find_metric(name: str, better: str | None = None) -> Metric:
    """The metric of that name.

    Args:
        name: One of `PLAIN`, ``texts/LABEL/perplexity`` (or ``kl``, ``nll``), or
            ``tasks/TASK/SCORE``.
        better: Which direction is better, where the user says it.

    Raises:
        ConfigError: There is none, or its better direction is not known or another.
    """
    known: str | None
    if name in PLAIN:
        logged, dense, known = PLAIN[name]
    elif name.startswith(TEXTS) and name.count("/") > 1 and name.split("/")[-1] in OF_TEXTS:
        own = name.removeprefix(TEXTS)
        logged, known = fit_name(f"compressed/{own}"), LOWER
        dense = None if name.endswith("/kl") else fit_name(f"dense/{own}")
    elif name.startswith(TASKS) and name.count("/") > 1 and all(name.split("/")):
        own = name.removeprefix(TASKS)
        logged, dense = fit_name(f"compressed/{own}"), fit_name(f"dense/{own}")
        score = own.rpartition("/")[2].partition(",")[0]
        known = next((way for way, words in SCORES.items() if score in words.split()), None)
    else:
        raise ConfigError(
            f"there is no metric {name!r}{nearest(name, [*PLAIN, 'generation'])}; there are "
            f"{', '.join(PLAIN)}, generation, texts/LABEL/perplexity (or kl) and tasks/TASK/SCORE"
        )
    if known is not None and better not in (None, known):
        raise ConfigError(f"gates: of {name} the {known} is better, not the {better}")
    if (known or better) is None:
        raise ConfigError(
            f"gates: of {name} it is not known which is better: add `better: higher` or "
            "`better: lower`"
        )
    return Metric(name, logged, dense, str(known or better))


@dataclass(frozen=True)
class Measured:
    """What a version's numbers were measured on, as its registration recorded it.

    Attributes:
        dense: Content of the dense model.
        compute: The dtype that the models ran in.
        texts: Label to the content of the windows, the first text first.
        tasks: lm-eval task to what decides its scores.
    """

    dense: str
    compute: str
    texts: Mapping[str, str]
    tasks: Mapping[str, str]

    def to_json(self) -> str:
        """As the version's tag has it."""
        return json.dumps(vars(self))

    @classmethod
    def from_json(cls, text: str | None) -> "Measured | None":
        """What a tag says; None of a version that has none or another kind."""
        if not text:
            return None
        try:
            fields: dict[str, Any] = json.loads(text)
            return cls(
                str(fields["dense"]),
                str(fields["compute"]),
                {str(k): str(v) for k, v in fields["texts"].items()},
                {str(k): str(v) for k, v in fields["tasks"].items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            return None


@dataclass(frozen=True)
class Measurements:
    """All that is known of a version.

    Attributes:
        version: Its number.
        metrics: The numbers of its run.
        measured: What they were measured on; None of versions from before that was recorded.
        speed: The conditions of its speed, where `eigenpress bench` recorded them.
    """

    version: int
    metrics: Mapping[str, float]
    measured: Measured | None
    speed: str | None = None


def counterpart(metric: Metric, one: Measurements, other: Measurements) -> tuple[str, str]:
    """What the other version's run calls the number to compare with.

    Returns:
        The name, "" where there is none to compare with, and then why not.
    """
    if metric.speed:
        same = one.speed == other.speed
        return (metric.logged, "") if same else ("", "its speed was measured in another way")
    if metric.name in PLAIN and metric.name not in OF_TEXTS:
        return metric.logged, ""
    if one.measured is None or other.measured is None:
        which = one if one.measured is None else other
        return "", f"version {which.version} does not say what it was measured on"
    if one.measured.compute != other.measured.compute:
        return "", f"it ran in {one.measured.compute} and the other in {other.measured.compute}"
    if metric.name.endswith("kl") and one.measured.dense != other.measured.dense:
        return "", "its KL is to another dense model"
    if metric.name.startswith(TASKS):
        return _same_task(metric, one.measured, other.measured)
    return _same_text(metric, one.measured, other.measured)


def _same_task(metric: Metric, one: Measured, other: Measured) -> tuple[str, str]:
    own = metric.name.removeprefix(TASKS)
    task = next((task for task in one.tasks if own.startswith(f"{task}/")), None)
    if task is None:
        return "", "it was not measured"
    if task not in other.tasks:
        return "", f"the other was not asked {task}"
    if one.tasks[task] != other.tasks[task]:
        return "", f"the other was asked {task} in another form, or other documents of it"
    return metric.logged, ""


def _same_text(metric: Metric, one: Measured, other: Measured) -> tuple[str, str]:
    """The other's text of the same content, whatever it is called there."""
    kind = metric.name.rpartition("/")[2]
    first = next(iter(one.texts), None)
    label = first if metric.name == kind else metric.name.removeprefix(TEXTS).rpartition("/")[0]
    if label is None or label not in one.texts:
        return "", "it was not measured"
    same = next((name for name, digest in other.texts.items() if digest == one.texts[label]), None)
    if same is None:
        return "", f"the other was not measured on these windows of {label}"
    first_of_both = metric.name == kind and same == next(iter(other.texts))
    return metric.logged if first_of_both else fit_name(f"compressed/{same}/{kind}"), ""
