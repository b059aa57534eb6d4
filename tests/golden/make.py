"""Golden values: what each method makes of one fixed layer. ``make golden`` writes them again.

The layer and its inputs come from NumPy's generator, whose stream is guaranteed, so that the
numbers can be compared on any machine.
"""

import json
from pathlib import Path

import numpy as np
import torch

from compress_core.decompose import Prepared, ReadRows
from compress_core.methods import METHODS, build_method
from compress_core.stats import InputAccumulator
from compress_core.types import LayerRef, Share

FILE = Path(__file__).with_name("values.json")
SHAPES = {"wide": (12, 20), "tall": (20, 12)}
RANKS = (1, 3, 6)


def first_rows(prepared: Prepared) -> ReadRows:
    """Reads a decomposition from memory, as the store would from disk."""
    return lambda name, rows: prepared.arrays[name][:rows]


def golden_values(name: str) -> dict[str, dict[str, list[float]]]:
    """Per shape: the loss curve, and of the weight at each rank one number per output row."""
    method = build_method(name)
    values = {}
    for label, (out_features, in_features) in SHAPES.items():
        generator = np.random.default_rng(20260101)
        weight = torch.from_numpy(generator.normal(size=(out_features, in_features)))
        scales = np.geomspace(0.1, 3.0, in_features)
        inputs = torch.from_numpy(generator.normal(size=(64, in_features)) * scales)
        accumulator = InputAccumulator(in_features)
        accumulator.add(inputs[None])
        metric = method.whiten.metric(accumulator.finish())
        layer = LayerRef(label, 0, out_features, in_features, label)
        prepared = method.decompose.prepare(weight, metric, layer.paying_rank)
        probe = torch.linspace(-1, 1, in_features, dtype=torch.float64)
        values[label] = {"loss": prepared.loss.tolist()}
        for rank in RANKS:
            low = method.decompose.realise(first_rows(prepared), Share(rank))
            outputs = low.u.double() @ (low.v.double() @ probe)
            values[label][f"outputs at rank {rank}"] = outputs.tolist()
    return values


if __name__ == "__main__":
    FILE.write_text(json.dumps({name: golden_values(name) for name in METHODS}, indent=1) + "\n")
