"""The smallest model within a perplexity: bisection over the kept share.

Statistics and decompositions are made once, so each step costs an allocation, the cut, and an
evaluation.
"""

import math
from typing import Any

from prefect import flow

from compress_core.errors import BudgetError, ConfigError
from flows.budget import MOST, at_share
from flows.config import RunConfig
from flows.console import get_reporter
from flows.prepare import Workspace, build_pipeline, open_workspace
from flows.results import collect_metrics
from flows.run import current_workspace, new_session, run_flow, run_groups

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
    workspace = current_workspace.get() or open_workspace(config)
    token = current_workspace.set(workspace)
    try:
        tried: dict[float, float] = {}
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
    result["target"] = {"perplexity": target, "tried": sorted(tried.items())}
    return result


def _refuse_unreachable(
    workspace: Workspace, config: RunConfig, target: float, tried: dict[float, float]
) -> None:
    nearest = _perplexity(workspace, config, MOST, tried)
    dense = tried[1.0]
    if dense > target:
        raise BudgetError(
            f"--target-perplexity {target:g} cannot be reached: the dense model itself has "
            f"{dense:.4g} on this text"
        )
    if nearest > target:
        raise BudgetError(
            f"--target-perplexity {target:g} cannot be reached: {config.method} at kept={MOST:g} "
            f"has {nearest:.4g}, the dense model {dense:.4g}; take another method or target"
        )


def _perplexity(
    workspace: Workspace, config: RunConfig, kept: float, tried: dict[float, float]
) -> float:
    """Of the first text at a share; infinite where the share is too small for the method."""
    reporter = get_reporter()
    try:
        pipeline = build_pipeline(workspace, at_share(config, kept))
    except (BudgetError, ConfigError):
        tried[kept] = math.inf
        reporter.say(f"── kept {kept:g}: too little for {config.method}")
        return math.inf
    reporter.say(f"── kept {kept:g}")
    session = new_session(workspace, pipeline.config)
    wanted = {text.unit for text in pipeline.evaluations if text.kind == "text"}
    run_groups(
        [g for g in pipeline.groups if g.stage != "evaluate" or wanted & set(g.units)], session
    )
    texts = [text for text in pipeline.evaluations if text.kind == "text"]
    metrics = collect_metrics(texts, session)
    tried[1.0] = metrics["dense"]["perplexity"]
    tried[kept] = metrics["compressed"]["perplexity"]
    workspace.models.drop("compressed")
    return tried[kept]
