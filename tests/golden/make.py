"""Golden values: what each method makes of one fixed layer, in a file per method.

``make golden`` writes them all again, ``make golden NAME=svd_llm`` those of that method alone.

The layer and its inputs come from NumPy's generator, whose stream is guaranteed, so that the
numbers can be compared on any machine.
"""

import inspect
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress_core.allocate.base import Evidence, Probe
from compress_core.coding.expected_entries import LEVELS, level_counts
from compress_core.decompose import LowRank, split_inputs
from compress_core.learn.teacher import teach
from compress_core.method import Method
from compress_core.methods import METHODS, build_method
from compress_core.types import LayerRef, Share
from tests.by_hand import Seen, prepare, realise
from tests.families import VOCABULARY, tiny_model
from tests.learning import prepare_lesson, shortened

FOLDER = Path(__file__).with_name("values")
SHAPES = {"wide": (12, 20), "tall": (20, 12)}
RANKS = (1, 3, 6)
VARIANTS = (
    "soco:phase1=8:phase2=8:phase3=8:rate=0.15",
    "soco:phase1=8:phase2=8:phase3=8:rate=0.15:factors=plain",
    "soco:map=relu:deviation=0:phase1=8:phase2=4:phase3=8:rate=0.15:factors=plain",
    "dobi_svd:steps=8:beta=0.5:rate=0.03",
    "dobi_svd:steps=8:beta=0.5:rate=0.03:remap=true",
    "cap:reading=printed:iterations=3",
    "cap:reading=printed:iterations=3:policy=group:init=activation",
    "cap:scale=none:init=activation:steps=4:refit=none",
    "cap:scale=none:policy=none:refit=none",
    "svd_llm:update=u",
    "duo_svd:refit_columns=true",
    "basis_sharing:update=u",
    "slim:mask=sparsegpt",
    "gptq:mixed=true:order=true:search=2",
    "caldera:factor_bits=16:turns=1",
    "caldera:bits=3:factor_bits=16:turns=1",
    "press:bits=16:correct=false",
    "press:columns=true",
    "press:bits=16:correct=false:columns=true",
)
"""Options that change what a method makes, and few steps where it trains: see `entries`."""
KEPT = 0.55
KEPT_IN_CODES = 0.25  # where not every layer keeps its whole weight
KEPTS = (0.35, 0.55, 0.75)  # of methods that prune or correct, in place of ranks
BITS = (2, 4, 8)  # of methods that keep the whole weight in codes, in place of ranks


def entries(method: str) -> list[str]:
    """The variants of a method that have golden values.

    Its defaults and what `VARIANTS` adds. A method that trains or goes by turns does so a few times
    only, since rounding grows from step to step and differs between processors: as `VARIANTS` say,
    or the shortest that there is.
    """
    variants = [name for name in VARIANTS if name.partition(":")[0] == method]
    built = build_method(method)
    if built.learn is None and not built.corrects:
        return [method, *variants]
    return variants or [shortened(method)]


def write(methods: Sequence[str]) -> None:
    """Writes the golden values of these methods, and nothing of any other."""
    for method in methods:
        values = {name: golden_values(name) for name in entries(method)}
        golden = {"facts": facts(method), "values": values}
        (FOLDER / f"{method}.json").write_text(json.dumps(golden, indent=1) + "\n")


def facts(name: str) -> dict[str, Any]:
    """The options' defaults, and what the method at these reads; for a person to look at once."""
    method = build_method(name)
    options = inspect.signature(METHODS[name]).parameters
    return {
        "defaults": {option: parameter.default for option, parameter in options.items()},
        "needs calibration": method.needs_calibration,
        "reads inputs": method.reads_inputs,
        "sequential": method.sequential,
    }


def golden_values(name: str) -> dict[str, dict[str, list[float]]]:
    """What the method makes of a layer of each shape, and how it divides a budget.

    Per shape: the loss curve, and of the weight at each rank one number per output row. Where
    shares hang on what was measured: the numbers stored of each layer of a small made-up model.
    Of methods that prune, and of those that correct a rounded weight: one number per output row at
    each of some budgets. Of other methods that round: the same at some widths. Of methods that
    train: their curves, and the numbers stored of each layer of a tiny model.
    """
    method = build_method(name)
    if method.learn is not None:
        return {"training": learned_values(method)}
    if method.prunes or method.corrects:
        return {label: pruned_values(method, label, shape) for label, shape in SHAPES.items()}
    made = rounded_values if method.rounds else cut_values
    values = {label: made(method, label, shape) for label, shape in SHAPES.items()}
    if method.allocate.reads:
        kepts = [KEPT] if method.coding is None else [KEPT, KEPT_IN_CODES]
        values["allocation"] = {f"numbers stored at kept {k}": allocation(method, k) for k in kepts}
    return values


def cut_values(method: Method, label: str, shape: tuple[int, int]) -> dict[str, list[float]]:
    """The loss curve, and what a method makes of a layer, or of two, at each rank."""
    stack = made_up_stack(shape)[: 1 if method.sharing is None else 2]
    rows = sum(len(layer.weight) for layer in stack)
    layer = LayerRef(label, 0, rows, shape[1], label)
    prepared = prepare(method, stack, layer.paying_rank)
    probe = torch.linspace(-1, 1, shape[1], dtype=torch.float64)
    values = {"loss": prepared.loss.tolist()}
    widths = [] if method.coding is None else [4]
    for rank in RANKS:
        for bits in (None, *widths):
            members = realise(method, stack, prepared, Share(rank, bits=bits))
            outputs = torch.cat([outputs_of(low, probe) for low in members])
            what = f"outputs at rank {rank}" + ("" if bits is None else f" in {bits} bits")
            values[what] = outputs.tolist()
    for bits in (None, *widths) if method.entries is not None else ():
        (low,) = realise(method, stack, prepared, Share(0, layer.dense_cost // 2, bits))
        what = "outputs of half the entries" + ("" if bits is None else f" in {bits} bits")
        values[what] = (low.dense() @ probe).tolist()
    for bits in (None, *widths) if method.columns is not None else ():
        (low,) = realise(method, stack, prepared, Share(0, bits=bits, columns=shape[1] // 2))
        what = "outputs of half the columns" + ("" if bits is None else f" in {bits} bits")
        values[what] = (low.dense() @ probe).tolist()
    return values


def rounded_values(method: Method, label: str, shape: tuple[int, int]) -> dict[str, list[float]]:
    """What a method that keeps the whole weight makes of a layer in codes of each width."""
    stack = made_up_stack(shape)[:1]
    probe = torch.linspace(-1, 1, shape[1], dtype=torch.float64)
    values = {}
    for bits in BITS:
        (low,) = realise(method, stack, None, Share(None, bits=bits))
        values[f"outputs in {bits} bits"] = (low.dense() @ probe).tolist()
    return values


def pruned_values(method: Method, label: str, shape: tuple[int, int]) -> dict[str, list[float]]:
    """What a method that begins with the weight and a share makes of a layer at each budget."""
    stack = made_up_stack(shape)[:1]
    layer = LayerRef(label, 0, *shape, label)
    probe = torch.linspace(-1, 1, shape[1], dtype=torch.float64)
    values = {}
    for kept in KEPTS:
        share = method.allocate.allocate([layer], kept, Evidence())[label]
        (low,) = realise(method, stack, None, share)
        values[f"outputs at kept {kept}"] = (low.dense() @ probe).tolist()
    return values


def learned_values(method: Method) -> dict[str, list[float]]:
    """What a method that trains finds on a tiny model, and how it came there."""
    assert method.learn is not None and method.decompose is not None
    tokens = np.random.default_rng(20260103).integers(0, VOCABULARY, (12, 16))
    school = prepare_lesson(made_up_model, method.decompose, torch.from_numpy(tokens))
    teacher = teach(made_up_model(1), school.windows, VOCABULARY, batch_size=4, device="cpu")
    school = replace(school, teacher=teacher)  # with its own, the first gradient is rounding only
    learned = school.learn(method.learn, KEPT)
    layers = [stack.as_layer for stack in method.stacks(school.layout.layers)]
    values = {name: curve.tolist() for name, curve in learned.curves.items()}
    values["numbers stored"] = [learned.chosen[layer.name].cost(layer) for layer in layers]
    return values


def made_up_model(seed: int = 0) -> PreTrainedModel:
    """A tiny Llama model, its matrices from NumPy's generator."""
    generator = np.random.default_rng(20260104 + seed)
    model = tiny_model("llama", dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                drawn = generator.normal(size=parameter.shape) * parameter.shape[-1] ** -0.5
                parameter.copy_(torch.from_numpy(drawn))
    return model


def made_up_stack(shape: tuple[int, int]) -> list[Seen]:
    """Two layers of one shape; only methods that share in-factors see the second."""
    in_features = shape[1]
    scales = np.geomspace(0.1, 3.0, in_features)
    layers = []
    for seed in (20260101, 20260102):
        generator = np.random.default_rng(seed)
        weight = torch.from_numpy(generator.normal(size=shape))
        dense = torch.from_numpy(generator.normal(size=(64, in_features)) * scales)
        error = torch.from_numpy(generator.normal(size=(64, in_features)) * scales)
        fisher = torch.from_numpy(generator.exponential(size=in_features))
        layers.append(Seen(weight, dense, dense + 0.3 * error + 0.1 * dense.roll(1, 1), fisher))
    return layers


def outputs_of(low: LowRank, probe: Tensor) -> Tensor:
    """What the factors make of one input."""
    if low.columns is None or low.index is None:
        return low.u @ (low.v @ probe)
    rest, kept = split_inputs(len(probe), low.index)
    return low.u @ (low.v @ probe[rest]) + low.columns @ probe[kept]


def allocation(method: Method, kept: float) -> list[float]:
    """Numbers stored of each layer, or stack of layers, of a model of four blocks."""
    shapes = {"q_proj": (48, 40), "o_proj": (40, 48), "up_proj": (96, 40)}
    layers = [
        LayerRef(f"model.layers.{block}.{kind}", block, m, n, kind)
        for block in range(4)
        for kind, (m, n) in shapes.items()
    ]
    layers = [stack.as_layer for stack in method.stacks(layers)]
    probe = method.allocate.probe(kept)
    losses, divergence, predicted, codes, entries, columns = {}, {}, {}, {}, {}, {}
    for place, layer in enumerate(layers):
        decay = 0.05 + 0.03 * ((5 * place) % 7)
        ranks = torch.arange(layer.paying_rank + 1, dtype=torch.float64)
        losses[layer.name] = (3 + place) * torch.exp(-decay * ranks)
        predicted[layer.name] = losses[layer.name] * (0.1 + 0.05 * ((3 * place) % 5))
        products = 0.2 * (1 + ranks / len(ranks)) * (ranks > 0)
        codes[layer.name] = (1 + place % 4) * torch.cat([torch.tensor([0.3]), products])
        parts = torch.arange(1, LEVELS, dtype=torch.float64) / LEVELS
        removed = (1 + place % 3) * (1 - parts) ** 3
        entries[layer.name] = torch.stack([removed, 0.3 * (1 + place % 4) * parts], dim=1)
        of_inputs = torch.tensor(level_counts(layer.in_features)) / layer.in_features
        left = (1 + (2 * place) % 3) * (1 - of_inputs.double()) ** 3
        columns[layer.name] = torch.stack([left, 0.2 * (1 + place % 4) * of_inputs], dim=1)
        divergence[layer.name] = [
            (1 + math.sin(place)) * (1 - share) ** (1 + place / 3)
            for share in (probe.shares if isinstance(probe, Probe) else ())
        ]
    similarity = {b: 0.9 - 0.1 * ((3 * b) % 4) for b in range(4)}
    curves = predicted, codes, entries, columns
    evidence = Evidence(losses, similarity, divergence, 500, *curves)
    shares = method.allocate.allocate(layers, kept, evidence)
    return [shares[layer.name].cost(layer) for layer in layers]


if __name__ == "__main__":
    unknown = [name for name in sys.argv[1:] if name not in METHODS]
    if unknown:
        sys.exit(f"no method {', '.join(unknown)}; known: {', '.join(METHODS)}")
    write(sys.argv[1:] or list(METHODS))
