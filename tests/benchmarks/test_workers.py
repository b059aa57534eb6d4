"""One run by one process, and by one and two of each kind: what is won, and nothing done twice."""

from pathlib import Path

from tests.benchmarks.commands import Took, command, llama
from tests.benchmarks.conftest import Bench
from tests.pipeline import pico

WIDTH, INNER, BLOCKS = 768, 2048, 8
KINDS = ("processes", "dask", "ray")


def seconds_of(took: Took) -> float:
    """Of the stages, from the first to the last; workers that start are in it."""
    return float(took.said["seconds"])


def spent_by(took: Took) -> float:
    """CPU seconds on record of all units."""
    return sum(unit["cpu_seconds"] or 0.0 for unit in took.said["stages"])


def test_workers(bench: Bench, tmp_path: Path) -> None:
    """Seconds of all stages, and CPU seconds of all units, beside those of one process."""
    inputs = pico.make_inputs(tmp_path, config=llama(WIDTH, INNER, BLOCKS, heads=12, groups=12))

    def took(name: str, **more: object) -> Took:
        settings = inputs.settings(tmp_path / name, samples=32, length=128, eval_windows=32)
        found = command("run", settings | more, tmp_path)
        computed = [u["key"] for u in found.said["stages"] if u["state"] == "computed"]
        assert len(computed) == len(set(computed)) == len(found.said["stages"])
        return found

    alone = took("here")
    digest = alone.said["metrics"]
    for kind in KINDS:
        for count in (1, 2):
            found = took(f"{kind}-{count}", runner=kind, workers=count)
            assert found.said["metrics"] == digest
            bench.row(
                benchmark=f"workers, {kind}, {count}",
                seconds=f"{seconds_of(found):.1f}",
                sooner_than_alone=f"{seconds_of(alone) / seconds_of(found):.2f}",
                efficiency=f"{seconds_of(alone) / seconds_of(found) / count:.2f}",
                cpu_of_units=f"{spent_by(found) / spent_by(alone):.2f}",
            )
    bench.row(benchmark="workers, none", seconds=f"{seconds_of(alone):.1f}")
