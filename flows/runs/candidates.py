"""Which version a promotion is about, and what is known of it."""

import math
from collections.abc import Sequence
from pathlib import Path

from compress_core.errors import ConfigError
from compress_core.options import nearest
from tasks.promotion.metrics import Measured, Measurements, counterpart, find_metric
from tasks.promotion.registry import CHAMPION, PREVIOUS
from tasks.tracking.client import Version
from tasks.tracking.versions import find_version, read_aliases, run_metrics

BEST = "best:"


def check_name(name: str) -> None:
    """Refuses what no registered model can be called.

    Raises:
        ConfigError: It is empty, or holds a sign that names a version.
    """
    sign = next((sign for sign in "/:@" if sign in name), None)
    if not name.strip() or sign:
        said = f"holds {sign!r}" if sign else "is empty"
        raise ConfigError(
            f"{name!r} is no name of a registered model: it {said}; the version goes into --version"
        )


def check_alias(alias: str) -> None:
    """Refuses what no promotion moves.

    Raises:
        ConfigError: MLflow takes no alias like that, or it is `previous`.
    """
    plain = alias.replace("-", "").replace("_", "")
    version = alias.lower().startswith("v") and alias[1:].isdecimal()
    if not (plain.isascii() and plain.isalnum()) or version or alias.lower() == "latest":
        raise ConfigError(
            f"--to {alias!r} is no alias: letters, digits, - and _, and neither latest nor v1"
        )
    if alias == PREVIOUS:
        raise ConfigError(f"--to {PREVIOUS}: it goes along with {CHAMPION} and is not moved alone")


def choose_version(
    home: Path, wanted: str, versions: Sequence[Version], champion: Version | None
) -> Version:
    """The version that is meant.

    Args:
        home: The data directory.
        wanted: "latest", a number, "best:METRIC" or an alias.
        versions: All versions of the model, in order.
        champion: The present champion.

    Raises:
        ConfigError: ``best:`` of something that is no metric, or that no version has.
        TrackingError: There is no such version or alias.
    """
    name = versions[0].name
    if wanted == "latest":
        return versions[-1]
    if wanted.startswith(BEST):
        return _best(home, wanted.removeprefix(BEST), versions, champion)
    if wanted.isdecimal():
        return find_version(home, f"{name}/{wanted}")
    aliases = read_aliases(home, name)
    if wanted not in aliases:
        words = ["latest", "best:METRIC", *aliases]
        raise ConfigError(
            f"--version {wanted!r} is neither a number nor one of {', '.join(words)}"
            f"{nearest(wanted, words)}"
        )
    return find_version(home, f"{name}@{wanted}")


def _best(home: Path, name: str, versions: Sequence[Version], champion: Version | None) -> Version:
    """The best of those that were measured like the champion, or else like the newest version."""
    metric = find_metric(name)
    like = measurements(home, champion or versions[-1])
    values: dict[int, float] = {}
    for version in versions:
        if version.run_id:  # of one that no run made nothing is known
            one = measurements(home, version)
            same = one.version == like.version
            logged = metric.logged if same else counterpart(metric, like, one)[0]
            value = one.metrics.get(logged, math.nan) if logged else math.nan
            if math.isfinite(value):
                values[version.version] = value
    if not values:
        raise ConfigError(
            f"--version {BEST}{name}: no version has a {name} that can be compared with that of "
            f"version {like.version}"
        )
    pick = min if metric.better == "lower" else max
    best = pick(values.values())
    number = max(number for number, value in values.items() if value == best)
    return next(version for version in versions if version.version == number)


def measurements(home: Path, version: Version) -> Measurements:
    """What is known of a version."""
    tags = version.tags
    measured = Measured.from_json(tags.get("measured"))
    return Measurements(version.version, run_metrics(home, version), measured, tags.get("speed"))
