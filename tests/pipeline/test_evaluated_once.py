"""The dense model runs over a text once: what leaves its last block is kept for whatever comes."""

from pathlib import Path

import pytest

from compress_core.hf.streamed import Streamed
from tasks.stages import evaluate
from tests.pipeline import pico


def count_passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the folder of a model whenever all of its blocks run."""
    ran: list[str] = []
    before = Streamed._run_blocks

    def run(self: Streamed, batch_size: int, progress: object) -> None:
        ran.append(type(self.stream).__name__)
        before(self, batch_size, progress)  # type: ignore[arg-type]

    monkeypatch.setattr(Streamed, "_run_blocks", run)
    return ran


def test_another_budget_runs_the_compressed_model_alone_to_the_same_numbers(
    inputs: pico.Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = count_passes(monkeypatch)
    pico.walk(inputs.settings(tmp_path / "kept", method="svd", kept=0.8))
    assert ran == ["BlockStream", "CompressedStream"]
    ran.clear()
    second = pico.walk(inputs.settings(tmp_path / "kept", method="svd", kept=0.5))
    assert ran == ["CompressedStream"]
    ran.clear()
    monkeypatch.setattr(evaluate, "MOST", 0)  # too large to be kept
    other = pico.walk(inputs.settings(tmp_path / "again", method="svd", kept=0.5))
    assert ran == ["BlockStream", "BlockStream", "CompressedStream"]
    assert other.metrics() == second.metrics()
    kept, not_kept = (
        set(walk.session.artifact(walk.pipeline.evaluations[0].unit).names)
        for walk in (second, other)
    )
    assert kept - not_kept == {evaluate.STATES} and not_kept < kept
