"""Promotion, rollback and history of a registered model: what the commands and the flows do.

Everything that takes long (files, gates) comes before the lease; under it an alias is moved only if
what the gates were held against is still the champion.
"""

import getpass
import json
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from compress_core.errors import ConfigError
from flows.runs.candidates import check_alias, check_name, choose_version, measurements
from flows.settings.gates import Gates
from tasks.promotion.gates import INCOMPARABLE, UNMEASURED, Verdict, evaluate_gates
from tasks.promotion.lease import HeldError, Lease, leased
from tasks.promotion.metrics import Measurements
from tasks.promotion.moves import (
    PROMOTE,
    ROLLBACK,
    Recorded,
    make_move,
    promotion_of,
    read_history,
    rollback_of,
    settle,
    unsettled,
)
from tasks.promotion.registry import CHAMPION, PREVIOUS
from tasks.tracking.client import Version
from tasks.tracking.registered_model import RegisteredModel, log_gates, versions_of
from tasks.tracking.speaking import alone
from tasks.tracking.versions import check_files, find_version, model_folder

Tell = Callable[[str], None]
LOCK = "promotion"


@dataclass(frozen=True)
class Asked:
    """What a promotion is asked for.

    Attributes:
        home: The data directory.
        name: The registered model.
        gates: What the version has to keep.
        version: "latest", a number, "best:METRIC" or an alias.
        alias: What is moved to it.
        why: For the record.
        dry_run: Whether gates are only shown.
        measure: Whether what is not comparable with the champion's is measured again.
        trust_remote_code: Whether the model folder's own Python may run.
    """

    home: Path
    name: str
    gates: Gates
    version: str = "latest"
    alias: str = CHAMPION
    why: str = ""
    dry_run: bool = False
    measure: bool = False
    trust_remote_code: bool = False


def promote(asked: Asked, tell: Tell = lambda line: None) -> dict[str, Any]:
    """Holds a version against its gates and moves the alias to it where it keeps them.

    Returns:
        ``{"name", "alias", "version", "from", "gates", "passed", "moved", "move"}``.

    Raises:
        ConfigError, TrackingError: What is asked for cannot be; nothing was moved.
        HeldError: Another promotion is at it, or was faster; nothing was moved.
    """
    check_name(asked.name)
    check_alias(asked.alias)
    versions = versions_of(asked.home, asked.name)
    model = RegisteredModel(asked.home, asked.name)
    _put_right(model, tell, asked.dry_run)
    aliases = model.aliases()
    champion = next((v for v in versions if v.version == aliases.get(CHAMPION)), None)
    version = choose_version(asked.home, asked.version, versions, champion)
    folder = _checked_folder(asked.home, version, tell)
    verdicts = _verdicts(asked, version, folder, champion, tell)
    passed = all(verdict.passed for verdict in verdicts)
    result: dict[str, Any] = {
        "name": asked.name,
        "alias": asked.alias,
        "version": version.version,
        "from": aliases.get(asked.alias),
        "champion": aliases.get(CHAMPION),
        "gates": [asdict(verdict) for verdict in verdicts],
        "passed": passed,
        "moved": False,
        "move": None,
    }
    if asked.dry_run:
        return result
    _log(asked.home, version, result)
    if not passed or aliases.get(asked.alias) == version.version:
        return result
    with _at_it(model, tell) as lease:
        _still(model, {CHAMPION: aliases.get(CHAMPION), asked.alias: aliases.get(asked.alias)})
        before, after = promotion_of(version.version, asked.alias, model.aliases())
        gates = [brief(verdict) for verdict in verdicts]
        move = make_move(
            lease, PROMOTE, asked.alias, before, after, who=who(), why=asked.why, gates=gates
        )
    return result | {"moved": True, "move": move.number}


def roll_back(
    home: Path, name: str, why: str = "", dry_run: bool = False, tell: Tell = lambda line: None
) -> dict[str, Any]:
    """Moves champion back to `previous`, and `previous` one further back along the history.

    Returns:
        ``{"name", "alias", "version", "from", "moved", "move"}``.

    Raises:
        ConfigError, TrackingError: There is nothing to go back to, or its files are not as they
            were; nothing was moved.
        HeldError: Another promotion is at it; nothing was moved.
    """
    check_name(name)
    versions = versions_of(home, name)
    model = RegisteredModel(home, name)
    _put_right(model, tell, dry_run)
    aliases = model.aliases()
    ways = _way_back(model, versions)
    target = ways[1][CHAMPION]
    assert target is not None
    _checked_folder(home, find_version(home, f"{name}/{target}"), tell)
    result = {
        "name": name,
        "alias": CHAMPION,
        "version": target,
        "from": aliases[CHAMPION],
        "moved": False,
        "move": None,
    }
    if dry_run:
        return result
    with _at_it(model, tell) as lease:
        _still(model, ways[0])
        move = make_move(lease, ROLLBACK, CHAMPION, *ways, who=who(), why=why)
    return result | {"moved": True, "move": move.number}


def history(home: Path, name: str) -> list[Recorded]:
    """Every move of a registered model's aliases, in order.

    Raises:
        ConfigError, TrackingError: There is no such model.
    """
    check_name(name)
    versions_of(home, name)
    return read_history(RegisteredModel(home, name).tags())


def _checked_folder(home: Path, version: Version, tell: Tell) -> Path:
    folder = model_folder(home, version)
    if not check_files(folder, version):
        tell(
            f"version {version.version} was registered before digests of its files were: whether "
            "they were changed since cannot be told"
        )
    return folder


def _verdicts(
    asked: Asked, version: Version, folder: Path, champion: Version | None, tell: Tell
) -> list[Verdict]:
    """All gates, the smoke test last."""
    own = measurements(asked.home, version)
    other = None if champion is None else measurements(asked.home, champion)
    verdicts = evaluate_gates(asked.gates.limits, own, other)
    if asked.measure and champion is not None and other is not None:
        own, other = _measured_again(asked, folder, own, champion, other, verdicts, tell)
        verdicts = evaluate_gates(asked.gates.limits, own, other)
    if asked.gates.generation is not None:
        from flows.runs.smoke import generation_verdicts

        compute = own.measured.compute if own.measured else "auto"
        verdicts += generation_verdicts(
            folder, asked.gates.generation, compute, asked.trust_remote_code
        )
    return verdicts


def _measured_again(
    asked: Asked,
    folder: Path,
    own: Measurements,
    champion: Version,
    other: Measurements,
    verdicts: Sequence[Verdict],
    tell: Tell,
) -> tuple[Measurements, Measurements]:
    """Both, where something of them could not be compared, measured on the same."""
    from flows.runs.measure import measure_both, speed_of_both

    fast = {gate.metric.name for gate in asked.gates.limits if gate.metric.speed}
    lacking = {v.metric for v in verdicts if v.why.startswith((INCOMPARABLE, UNMEASURED))}
    if any(v.why.startswith(INCOMPARABLE) and v.metric not in fast for v in verdicts):
        own, other = measure_both(asked.home, folder, own, champion, asked.trust_remote_code, tell)
    if lacking & fast and own.version != other.version:
        tell(f"measuring the speed of versions {own.version} and {other.version} in turns")
        there = model_folder(asked.home, champion)
        compute = own.measured.compute if own.measured else "auto"
        own, other = speed_of_both(folder, own, there, other, compute, asked.trust_remote_code)
    return own, other


def brief(verdict: Verdict) -> dict[str, Any]:
    """A verdict as the record of a move has it."""
    return {name: value for name, value in asdict(verdict).items() if value not in (None, "")}


def _log(home: Path, version: Version, result: Mapping[str, Any]) -> None:
    """On the version, and with all its numbers on its run."""
    when = datetime.now(UTC).isoformat(timespec="seconds")
    failed = [gate["metric"] for gate in result["gates"] if not gate["passed"]]
    said = {"when": when, "passed": result["passed"], "failed": failed[:20]}
    said |= {name: result[name] for name in ("alias", "champion")}
    log_gates(home, version, json.dumps(said), json.dumps({"when": when, **result}, indent=1))


def _way_back(model: RegisteredModel, versions: Sequence[Version]) -> Any:
    ways = rollback_of(
        model.aliases(), read_history(model.tags()), [version.version for version in versions]
    )
    if ways is None:
        champion = model.aliases().get(CHAMPION)
        said = f"is version {champion}" if champion else "was never set"
        raise ConfigError(
            f"{model.name!r} has nothing to roll back to: {CHAMPION} {said} and there is no "
            f"{PREVIOUS}; `eigenpress promote {model.name} --version N` moves it anywhere"
        )
    return ways


@contextmanager
def _at_it(model: RegisteredModel, tell: Tell) -> Iterator[Lease]:
    """Alone at a model's aliases, whatever a killed promotion left put right before."""
    with alone(model.home, LOCK), leased(model, who()) as lease:
        settle(lease, tell)
        yield lease


def _put_right(model: RegisteredModel, tell: Tell, dry_run: bool) -> None:
    """Settles what a killed promotion left, before anything is read that it may have changed."""
    begun = unsettled(model.tags())
    if begun and dry_run:
        tell(f"{begun[0].kind} {begun[0].number} was cut short, or goes on: its aliases may change")
    elif begun:
        with _at_it(model, tell):
            pass


def _still(model: RegisteredModel, wanted: Mapping[str, int | None]) -> None:
    """Refuses to move on when another promotion was faster.

    Raises:
        HeldError: An alias is not where it was when the gates were evaluated.
    """
    there = model.aliases()
    for alias, version in wanted.items():
        if there.get(alias) != version:
            now = there.get(alias)
            last = [one.move for one in read_history(model.tags()) if one.move.alias == alias]
            by = f", moved by {last[-1].who}" if last and last[-1].target == now else ""
            raise HeldError(
                f"another promotion of {model.name!r} was faster: {alias} is "
                f"{f'version {now}' if now else 'no version'} by now{by}; nothing was moved, the "
                "same command again compares with it"
            )


def who() -> str:
    """The user and the machine, for records."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user has no name
        user = "somebody"
    return f"{user}@{socket.gethostname()}"
