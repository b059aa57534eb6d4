"""What a sweep took: shared units count once together, and in every run alone."""

from typing import Any

from flows.report.spent import spent_of, with_spent


def run(method: str, kept: float, **units: float | None) -> dict[str, Any]:
    stages = [{"name": "decompose", "key": k, "cpu_seconds": s} for k, s in units.items()]
    stages.append({"name": "register", "key": "r", "cpu_seconds": None})
    return {"method": method, "kept": kept, "stages": stages}


def test_what_runs_share_is_added_once_and_counts_alone_in_each() -> None:
    found = with_spent([run("svd", 0.8, a=60, b=1), run("svd", 0.6, a=60, c=2), run("asvd", 0.8)])
    assert all("cpu_seconds" not in each for each in found)  # of the last one nothing is on record
    first, second = with_spent([run("svd", 0.8, a=60, b=1), run("svd", 0.6, a=60, c=2)])
    assert first["cpu_seconds"] == {"alone": 61, "added": 61}
    assert second["cpu_seconds"] == {"alone": 62, "added": 2}


def test_runs_together_and_apart_are_added_up() -> None:
    found = with_spent([run("svd", 0.8, a=3600), run("svd", 0.6, a=3600, c=1800)])
    assert spent_of(found) == (5400, 9000)
    assert spent_of(with_spent([run("svd", 0.8, a=None)])) is None
