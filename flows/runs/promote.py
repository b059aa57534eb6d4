"""Promotion and rollback as Prefect flows, for deployments: a gate that fails fails the flow.

Prefect reads the annotations of flows at run time, so they are not postponed here.
"""

from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger

from flows.runs.promotion import Asked, promote, roll_back
from flows.settings.gates import DEFAULTS, build_gates
from flows.settings.home import default_home, open_home
from tasks.promotion.registry import CHAMPION


class GatesFailedError(RuntimeError):
    """A version does not keep its gates; nothing was moved."""


@flow(
    name="eigenpress promote",
    flow_run_name="{name} {version} to {to}",
    persist_result=False,
)
def promote_flow(
    name: str,
    version: str = "latest",
    to: str = CHAMPION,
    gates: dict[str, Any] | None = None,
    why: str = "",
    measure: bool = False,
    home: Path | None = None,
) -> dict[str, Any]:
    """Moves an alias to a version that keeps its gates.

    Args:
        name: The registered model.
        version: "latest", a number, "best:METRIC" or an alias.
        to: The alias.
        gates: Metric to limits, as in a gates file; the defaults without.
        why: For the record.
        measure: Whether what is not comparable with the champion's is measured again.
        home: Data directory; else EIGENPRESS_HOME or ~/.eigenpress.

    Returns:
        The result, as ``eigenpress promote --json`` prints it.

    Raises:
        GatesFailedError: A gate failed; nothing was moved.
    """
    where = _home(home)
    tell = get_run_logger().info
    built = build_gates(DEFAULTS if gates is None else gates, "of the flow")
    asked = Asked(where, name, built, version, to, why, measure=measure)
    result = promote(asked, tell)
    for gate in result["gates"]:
        tell("%s, %s: %s", gate["metric"], gate["rule"], "kept" if gate["passed"] else gate["why"])
    if not result["passed"]:
        failed = ", ".join(gate["metric"] for gate in result["gates"] if not gate["passed"])
        raise GatesFailedError(
            f"version {result['version']} of {name!r} does not keep its gates ({failed}); nothing "
            "was moved"
        )
    return result


@flow(name="eigenpress rollback", flow_run_name="{name}", persist_result=False)
def rollback_flow(name: str, why: str = "", home: Path | None = None) -> dict[str, Any]:
    """Moves champion back to the version before it.

    Args:
        name: The registered model.
        why: For the record.
        home: Data directory; else EIGENPRESS_HOME or ~/.eigenpress.

    Returns:
        The result, as ``eigenpress rollback --json`` prints it.
    """
    return roll_back(_home(home), name, why, tell=get_run_logger().info)


def _home(home: Path | None) -> Path:
    where = (home or default_home()).expanduser().absolute()
    open_home(where)
    return where
