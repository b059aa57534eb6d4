"""Who cannot be told from the best of a budget: by the differences of windows, not by the means."""

import math
import random
from statistics import fmean
from typing import Any

from flows.report.markdown import markdown_table
from flows.report.noise import BEST_OR_NEAR, best_or_near, not_worse

TEXT = "text"


def _run(method: str, nlls: list[float] | None, kept: float = 0.5) -> dict[str, Any]:
    text = {"perplexity": math.exp(fmean(nlls or [1.0]))}
    found: dict[str, Any] = {"method": method, "kept": kept}
    found["metrics"] = {"compressed": {"texts": {TEXT: text}}}
    return found | ({} if nlls is None else {"windows": {"compressed": {TEXT: nlls}}})


def test_what_is_hard_for_all_hides_no_difference() -> None:
    hard = [random.Random(0).uniform(1, 9) for _ in range(20)]
    worse = [nll + 0.01 for nll in hard]  # a gap far below the spread of windows
    assert best_or_near([_run("a", hard), _run("b", worse)], TEXT) == {("a", 0.5)}


def test_two_errors_of_the_mean_difference_are_the_limit() -> None:
    best = [0.0] * 4
    spread = [1.0, -1.0, 1.0, -1.0]  # standard error of the mean: sqrt(4 / 3) / 2
    limit = 2 * (4 / 3) ** 0.5 / 2
    assert not_worse([part + limit - 1e-9 for part in spread], best)
    assert not not_worse([part + limit + 1e-9 for part in spread], best)


def test_the_same_model_is_near_and_one_window_decides_by_its_own() -> None:
    assert not_worse([1.0, 2.0], [1.0, 2.0])
    assert not not_worse([1.5], [1.0])


def test_without_a_rival_nothing_is_marked_and_without_windows_the_best_alone() -> None:
    alone = _run("a", [1.0, 2.0])
    assert best_or_near([alone], TEXT) == set()
    assert best_or_near([alone, _run("b", [1.0, 2.0])], TEXT) == {("a", 0.5), ("b", 0.5)}
    assert best_or_near([alone, _run("b", None)], TEXT) == {("b", 0.5)}  # perplexity e, not e^1.5


def test_budgets_are_compared_with_themselves_alone() -> None:
    runs = [
        _run(name, [nll, nll + 1], kept)
        for name, kept, nll in [("a", 0.5, 1), ("b", 0.5, 2), ("a", 0.2, 4), ("b", 0.2, 3)]
    ]
    assert best_or_near(runs, TEXT) == {("a", 0.5), ("b", 0.2)}


def test_a_table_says_what_is_bold() -> None:
    def run(method: str, nll: float) -> dict[str, Any]:
        text = {"perplexity": 2.5 * nll, "kl": 0.1, "windows": 2, "length": 8}
        sizes = {"dense": 10, "compressed": 5}
        return _run(method, [nll, nll + 1]) | {
            "model": "m",
            "seed": 0,
            "metrics": {
                "dense": {"texts": {TEXT: text}, "tasks": {}},
                "compressed": {"texts": {TEXT: text}, "tasks": {}},
            },
            "parameters": sizes,
            "bytes": sizes,
            "memory": sizes,
        }

    said = markdown_table([run("a", 1), run("b", 2)])
    assert BEST_OR_NEAR in said and "| a | **2.5** (0.100) |" in said and "| b | 5 (" in said
