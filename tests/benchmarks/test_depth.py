"""What `hull` measures and what `fisher` computes in its place, against the model's depth."""

from pathlib import Path
from time import process_time

from tasks.engine.session import Session
from tests.benchmarks.commands import exponent, llama
from tests.benchmarks.conftest import Bench
from tests.pipeline import pico

DEPTHS = (4, 8, 16)
ALLOCATORS = {"hull": "hull:probe_windows=16", "fisher": "fisher:windows=16"}


def cpu_seconds(inputs: pico.Inputs, home: Path, allocator: str) -> float:
    """Of what only this allocator asks for: its table, or gradients and curves."""
    settings = inputs.settings(home, method=f"svd_llm@{allocator}", samples=16, length=128)
    pipeline, store, _ = pico.build(settings)
    session, spent = Session(store), 0.0
    for group in pipeline.groups:
        started = process_time()
        session.run(group)
        if group.stage in ("probe", "predict") or group.label.startswith("output gradients"):
            spent += process_time() - started
        if group.stage == "allocate":
            return spent
    raise AssertionError("nothing was allocated")


def test_allocators_against_depth(bench: Bench, tmp_path: Path) -> None:
    """Multiples of fisher's CPU seconds on the shallowest model, and the exponent of the depth."""
    found = {
        blocks: {
            name: cpu_seconds(inputs, tmp_path / f"{name} {blocks}", words)
            for name, words in ALLOCATORS.items()
        }
        for blocks in DEPTHS
        for inputs in [pico.make_inputs(tmp_path / str(blocks), config=llama(128, 352, blocks))]
    }
    for name in ALLOCATORS:
        seconds = [found[blocks][name] for blocks in DEPTHS]
        bench.row(
            benchmark=f"{name} against depth",
            **{
                f"blocks_{blocks}": f"{part / found[DEPTHS[0]]['fisher']:.2f}"
                for blocks, part in zip(DEPTHS, seconds, strict=True)
            },
            exponent=f"{exponent(DEPTHS, seconds):.2f}",
        )
