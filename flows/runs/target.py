"""The smallest model within a perplexity: bisection over the kept share.

Statistics and decompositions are made once, so each step costs an allocation, the cut, and an
evaluation.
"""

import math
from typing import Any

from compress_core.errors import BudgetError
from flows.runs.budget import MOST, at_kept
from flows.runs.opened import Opened
from flows.runs.pipeline import Pipeline, build_pipeline
from flows.runs.run import run_groups, run_in_flow
from flows.settings.config import RunConfig

TOLERANCE = 0.005


def run_search(opened: Opened) -> dict[str, Any]:
    """Finds the smallest kept whose perplexity stays within the target, and runs it.

    Returns:
        The result of that run, with what was tried under ``"target"``.

    Raises:
        BudgetError: No kept meets it; says what the nearest gave.
    """
    return _Search(opened).run()


class _Search:
    def __init__(self, opened: Opened) -> None:
        assert isinstance(opened.settings, RunConfig)
        assert opened.settings.target_perplexity is not None
        self.opened = opened
        self.config: RunConfig = opened.settings
        self.target: float = opened.settings.target_perplexity
        self.tried: dict[float, float | None] = {}
        self.pipelines: dict[float, Pipeline] = {MOST: opened.pipelines[0]}

    def run(self) -> dict[str, Any]:
        """Bisection, then the run at what it found."""
        low, high = 0.0, MOST
        self._refuse_unreachable()
        while high - low > TOLERANCE:
            middle = round((low + high) / 2, 4)
            met = self._perplexity(middle) <= self.target
            low, high = (low, middle) if met else (middle, high)
        result = run_in_flow(self.opened, self.pipelines[high])
        result["target"] = {
            "perplexity": self.target,
            "tried": [list(pair) for pair in sorted(self.tried.items())],
        }
        return result

    def _refuse_unreachable(self) -> None:
        target = self.target
        self.opened.reporter.say("── dense")
        dense = self.tried[1.0] = self._measure(self.pipelines[MOST], "dense")
        if dense > target:
            raise BudgetError(
                f"--target-perplexity {target:g} cannot be reached: the dense model itself has "
                f"{dense:.4g} on this text"
            )
        nearest = self._perplexity(MOST)
        if nearest > target:
            raise BudgetError(
                f"--target-perplexity {target:g} cannot be reached: {self.config.method} at "
                f"kept={MOST:g} has {nearest:.4g}, the dense model {dense:.4g}; take another "
                "method or target"
            )

    def _perplexity(self, kept: float) -> float:
        """Of the first text; infinite where kept is too small for the method."""
        reporter = self.opened.reporter
        try:
            if kept not in self.pipelines:
                config = at_kept(self.config, kept)
                self.pipelines[kept] = build_pipeline(self.opened.workspace, config)
            reporter.say(f"── kept {kept:g}")
            found = self._measure(self.pipelines[kept], "compressed")
        except BudgetError:
            reporter.say(f"── kept {kept:g}: too little for {self.config.method}")
            self.tried[kept] = None  # JSON knows no infinity
            return math.inf
        self.tried[kept] = found
        return found

    def _measure(self, pipeline: Pipeline, which: str) -> float:
        """Perplexity of the dense or the compressed model on the first text."""
        text = next(e for e in pipeline.evaluations if (e.kind, e.model) == ("text", which))
        needed = {text.unit, *text.unit.inputs.values()}
        groups = [
            group
            for group in pipeline.groups
            if needed & set(group.units) or (which == "compressed" and group.stage != "evaluate")
        ]
        session = self.opened.session()
        hands = self.opened.hands(pipeline, groups, session)
        run_groups(groups, session, self.opened.reporter, hands)
        self.opened.workspace.models.drop()
        return float(session.artifact(text.unit).attrs["perplexity"])
