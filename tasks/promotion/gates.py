"""Gates: limits that a version has to keep before an alias is moved to it. Pure.

Every gate is evaluated, also behind one that failed. What is missing or no number fails.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from compress_core.errors import ConfigError
from tasks.promotion.metrics import HIGHER, LOWER, Measurements, Metric, counterpart

INCOMPARABLE, UNMEASURED = "not comparable", "not measured"
MEASURE = "--measure measures both on the same"


@dataclass(frozen=True)
class Allowance:
    """How much worse than something a metric may be.

    Attributes:
        amount: 0 or more; of the reference where ``relative``, else in the metric's unit.
        relative: Whether it is a share of the reference.
    """

    amount: float
    relative: bool

    def of(self, reference: float) -> float:
        """In the metric's unit."""
        return self.amount * abs(reference) if self.relative else self.amount

    def __str__(self) -> str:
        return f"{self.amount * 100:g}%" if self.relative else f"{self.amount:g}"


@dataclass(frozen=True)
class Gate:
    """The limits of one metric.

    Attributes:
        metric: The metric.
        max: Its largest value.
        min: Its smallest value.
        worse_than_dense: How much worse than the dense model's it may be.
        worse_than_champion: How much worse than the champion's it may be.
        standard_errors: A difference of so many standard errors of the difference is none; None
            for one where the metric has a standard error.
    """

    metric: Metric
    max: float | None = None
    min: float | None = None
    worse_than_dense: Allowance | None = None
    worse_than_champion: Allowance | None = None
    standard_errors: float | None = None


@dataclass(frozen=True)
class Verdict:
    """What became of one limit.

    Attributes:
        metric: Its name.
        rule: The limit in words: "max 20", "max champion + 2%".
        value: The version's number; None where there is none.
        limit: The number that it was held against; None where there is none.
        passed: Whether it is kept.
        why: What there is to say beside the numbers.
    """

    metric: str
    rule: str
    value: float | None
    limit: float | None
    passed: bool
    why: str = ""


def evaluate_gates(
    gates: Sequence[Gate], version: Measurements, champion: Measurements | None
) -> list[Verdict]:
    """Every limit of every gate.

    Args:
        gates: The gates.
        version: The version that asks.
        champion: The present champion; without one, gates against it pass.

    Raises:
        ConfigError: A gate is relative to a dense metric that the version's run does not have.
    """
    return [verdict for gate in gates for verdict in _of_gate(gate, version, champion)]


def _of_gate(gate: Gate, version: Measurements, champion: Measurements | None) -> Iterator[Verdict]:
    metric = gate.metric
    value = version.metrics.get(metric.logged)
    for rule, limit, better in (("max", gate.max, LOWER), ("min", gate.min, HIGHER)):
        if limit is not None:
            yield _held(metric, f"{rule} {_said(limit)}", value, limit, better)
    if gate.worse_than_dense is not None:
        rule = _rule(metric, "dense", gate.worse_than_dense)
        reference = version.metrics.get(metric.dense) if metric.dense else None
        if value is None:
            yield _held(metric, rule, value, math.nan, metric.better)
        elif reference is None:
            raise ConfigError(
                f"gates: version {version.version} has no {metric.name} of the dense model, so "
                "worse_than_dense has nothing to compare with: leave it out, or promote a version "
                "whose run measured it"
            )
        else:
            error = _dense_error(metric, version)
            yield _relative(gate, rule, gate.worse_than_dense, version, reference, error)
    if gate.worse_than_champion is not None:
        yield _against_champion(gate, gate.worse_than_champion, version, champion)


def _dense_error(metric: Metric, version: Measurements) -> float | None:
    name = metric.standard_error
    return version.metrics.get(name.replace("compressed/", "dense/", 1)) if name else None


def _against_champion(
    gate: Gate, allowance: Allowance, version: Measurements, champion: Measurements | None
) -> Verdict:
    metric, rule = gate.metric, _rule(gate.metric, "champion", allowance)
    value = version.metrics.get(metric.logged)
    if champion is None or champion.version == version.version:
        first = "no champion yet" if champion is None else "it is the champion"
        return _number(metric, rule, value) or Verdict(metric.name, rule, value, None, True, first)
    if (broken := _number(metric, rule, value)) is not None:
        return broken
    name, why = counterpart(metric, version, champion)
    if not name:
        how = f"`eigenpress bench` both alike, or {MEASURE}" if metric.speed else MEASURE
        return Verdict(metric.name, rule, value, None, False, f"{INCOMPARABLE}: {why}; {how}")
    reference = champion.metrics.get(name)
    if reference is None or not math.isfinite(reference):
        said = "was not measured" if reference is None else f"is {reference}"
        return Verdict(metric.name, rule, value, None, False, f"the champion's {said}")
    error = metric.standard_error
    return _relative(
        gate, rule, allowance, version, reference, champion.metrics.get(error) if error else None
    )


def _relative(
    gate: Gate,
    rule: str,
    allowance: Allowance,
    version: Measurements,
    reference: float,
    reference_error: float | None,
) -> Verdict:
    """A limit that lies an allowance, or some standard errors, to the worse of a reference."""
    metric = gate.metric
    value = version.metrics.get(metric.logged)
    own_error = version.metrics.get(metric.standard_error) if metric.standard_error else None
    slack, why = allowance.of(reference), ""
    if own_error is not None and reference_error is not None:
        times = 1.0 if gate.standard_errors is None else gate.standard_errors
        noise = times * math.hypot(own_error, reference_error)
        if not noise <= slack:  # not-a-number is neither
            slack = noise
            why = f"the limit allows {times:g} × the standard error of the difference, {noise:.3g}"
    elif gate.standard_errors:
        return Verdict(metric.name, rule, value, None, False, "no standard error was recorded")
    limit = reference + slack if metric.better == LOWER else reference - slack
    verdict = _held(metric, rule, value, limit, metric.better)
    return verdict if verdict.why else Verdict(**{**vars(verdict), "why": why})


def _rule(metric: Metric, than: str, allowance: Allowance) -> str:
    return f"max {than} + {allowance}" if metric.better == LOWER else f"min {than} − {allowance}"


def _said(limit: float) -> str:
    return f"{limit:,.0f}" if abs(limit) >= 1e5 else f"{limit:.6g}"


def _held(metric: Metric, rule: str, value: float | None, limit: float, better: str) -> Verdict:
    if (broken := _number(metric, rule, value, limit)) is not None:
        return broken
    assert value is not None
    if not math.isfinite(limit):
        return Verdict(metric.name, rule, value, None, False, f"its reference is {limit}")
    passed = value <= limit if better == LOWER else value >= limit
    return Verdict(metric.name, rule, value, limit, passed)


def _number(
    metric: Metric, rule: str, value: float | None, limit: float | None = None
) -> Verdict | None:
    """The verdict on what is missing or no number; None on a number."""
    limit = limit if limit is not None and math.isfinite(limit) else None
    if value is None:
        how = "; `eigenpress bench` measures it" if metric.speed else ""
        return Verdict(metric.name, rule, None, limit, False, f"{UNMEASURED}{how}")
    if not math.isfinite(value):
        return Verdict(metric.name, rule, None, limit, False, f"it is {value}")
    return None
