"""The smallest model within a perplexity: bisection over the kept share.

Statistics and decompositions are made once, so each step costs an allocation, the cut, and an
evaluation.
"""

import math
from typing import Any

from prefect import flow

from compress_core.errors import BudgetError
from flows.report.console import get_reporter
from flows.runs.budget import MOST, at_share
from flows.runs.pipeline import Pipeline, build_pipeline
from flows.runs.run import current_workspace, new_session, run_flow, run_groups
from flows.runs.workspace import Workspace, open_workspace
from flows.settings.checks import check_methods
from flows.settings.config import RunConfig

TOLERANCE = 0.005


@flow(
    name="eigenpress target",
    flow_run_name="{config.method} perplexity {config.target_perplexity} · {config.model}",
    persist_result=False,
)
def target_flow(config: RunConfig) -> dict[str, Any]:
    """Finds the smallest share whose perplexity stays within the target, and runs it.

    Args:
        config: What is asked for, with ``target_perplexity``.

    Returns:
        The result of that run, with what was tried under ``"target"``.

    Raises:
        BudgetError: No share meets it; says what the nearest gave.
    """
    target = config.target_perplexity
    assert target is not None
    workspace = current_workspace.get()
    if workspace is None:
        check_methods(config, [config.method], [])
        workspace = open_workspace(config)
    token = current_workspace.set(workspace)
    try:
        tried: dict[float, float | None] = {}
        high = MOST
        _refuse_unreachable(workspace, config, target, tried)
        low = 0.0
        while high - low > TOLERANCE:
            middle = round((low + high) / 2, 4)
            met = _perplexity(workspace, config, middle, tried) <= target
            low, high = (low, middle) if met else (middle, high)
        result = run_flow(at_share(config, high))
    finally:
        current_workspace.reset(token)
    result["target"] = {
        "perplexity": target,
        "tried": [list(pair) for pair in sorted(tried.items())],
    }
    return result


def _refuse_unreachable(
    workspace: Workspace, config: RunConfig, target: float, tried: dict[float, float | None]
) -> None:
    get_reporter().say("── dense")
    pipeline = build_pipeline(workspace, at_share(config, MOST))
    dense = tried[1.0] = _measure(workspace, pipeline, "dense")
    if dense > target:
        raise BudgetError(
            f"--target-perplexity {target:g} cannot be reached: the dense model itself has "
            f"{dense:.4g} on this text"
        )
    nearest = _perplexity(workspace, config, MOST, tried)
    if nearest > target:
        raise BudgetError(
            f"--target-perplexity {target:g} cannot be reached: {config.method} at kept={MOST:g} "
            f"has {nearest:.4g}, the dense model {dense:.4g}; take another method or target"
        )


def _perplexity(
    workspace: Workspace, config: RunConfig, kept: float, tried: dict[float, float | None]
) -> float:
    """Of the first text at a share; infinite where the share is too small for the method."""
    reporter = get_reporter()
    try:
        pipeline = build_pipeline(workspace, at_share(config, kept))
        reporter.say(f"── kept {kept:g}")
        found = _measure(workspace, pipeline, "compressed")
    except BudgetError:
        reporter.say(f"── kept {kept:g}: too little for {config.method}")
        tried[kept] = None  # JSON knows no infinity
        return math.inf
    tried[kept] = found
    return found


def _measure(workspace: Workspace, pipeline: Pipeline, which: str) -> float:
    """Perplexity of the dense or the compressed model on the first text."""
    text = next(e for e in pipeline.evaluations if (e.kind, e.model) == ("text", which))
    needed = {text.unit, text.unit.inputs["evaluation tokens"]}
    groups = [
        group
        for group in pipeline.groups
        if needed & set(group.units) or (which == "compressed" and group.stage != "evaluate")
    ]
    session = new_session(workspace, pipeline.config)
    run_groups(groups, session)
    workspace.models.drop("compressed")
    return float(session.artifact(text.unit).attrs["perplexity"])
