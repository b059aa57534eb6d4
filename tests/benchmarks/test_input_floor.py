"""How much of a real model's inputs AdaSVD's floor leaves out of the inverse of H."""

from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compress_core.refine.least_squares import INPUT_FLOOR
from compress_core.stats import InputStats
from tasks.engine.session import Session
from tasks.stages.arrays import Stored
from tests.benchmarks.commands import SMOLLM2
from tests.benchmarks.conftest import Bench
from tests.pipeline import pico


def test_directions_below_the_floor(bench: Bench, shared: Path, tmp_path: Path) -> None:
    """Of every kind of layer the part of directions and of energy, and the largest's own energy."""
    if not SMOLLM2.is_dir():
        pytest.skip(f"needs {SMOLLM2}: make build/smollm2-135m")
    settings = {
        "model": str(SMOLLM2),
        "calibration": str(shared / "data" / "wiki2015" / "valid.jsonl"),
        "method": "svd_llm",
        "kept": 0.8,
        "samples": 48,
        "length": 512,
        "products": "float32",
        "device": "cpu",
        "home": tmp_path,
    }
    pipeline, store, _ = pico.build(settings)
    session = Session(store)
    found: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for group in pipeline.groups:
        if group.stage not in ("tokenise", "collect"):
            break
        session.run(group)
        for unit in group.units if group.stage == "collect" else ():
            artifact = session.artifact(unit)
            if "gram" in artifact.names:
                gram = InputStats.unpack(Stored(artifact)).gram
                found[unit.name.rpartition(".")[2]].append(below(torch.linalg.eigvalsh(gram)))
    for kind, parts in found.items():
        directions, energies, largest = (sorted(part) for part in zip(*parts, strict=True))
        bench.row(
            benchmark=f"directions of H below the floor, {kind}",
            median=f"{directions[len(parts) // 2]:.3f}",
            most=f"{directions[-1]:.3f}",
            energy_at_most=f"{energies[-1]:.1e}",
            largest_direction=f"{largest[len(parts) // 2]:.2f} to {largest[-1]:.3f}",
        )


def below(eigenvalues: Tensor) -> tuple[float, float, float]:
    """Part of directions below the floor, their energy, and that of the largest direction."""
    under = eigenvalues < INPUT_FLOOR * eigenvalues[-1]
    energy = eigenvalues.clamp(min=0) / eigenvalues.clamp(min=0).sum()
    return float(under.double().mean()), float(energy[under].sum()), float(energy[-1])
