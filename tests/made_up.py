"""Made-up layers, evidence and inputs, for tests of what divides a budget and what refines."""

import zlib

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from compress_core.allocate.base import Allocator, Evidence, Probe
from compress_core.coding.expected_entries import level_counts
from compress_core.forms.names import PLAIN
from compress_core.types import LayerRef

SHAPES = st.lists(st.tuples(st.integers(2, 40), st.integers(2, 40)), min_size=1, max_size=7)
SEEDS = st.integers(0, 10_000)


def layers_of(shapes: list[tuple[int, int]], form: str = PLAIN) -> list[LayerRef]:
    """Two layers to a block, their products stored in a form."""
    names = [f"model.layers.{i // 2}.{'qo'[i % 2]}_proj" for i in range(len(shapes))]
    return [
        LayerRef(name, i // 2, m, n, name, form=form)
        for i, (name, (m, n)) in enumerate(zip(names, shapes, strict=True))
    ]


def evidence_for(
    allocator: Allocator, layers: list[LayerRef], kept: float, seed: int, noise: float = 0.0
) -> Evidence:
    """What ``allocator`` reads and nothing else; a layer's part hangs on its name and the seed.

    Losses are those of random energies, so convex and falling; divergences fall with the share,
    but for ``noise``.
    """
    return Evidence(
        losses={x.name: losses_of(x, seed) for x in layers} if "losses" in allocator.reads else {},
        similarity={
            block: float(_generator(f"block {block}", seed).uniform(0.3, 1))
            for block in {x.block for x in layers}
            if "similarity" in allocator.reads
        },
        divergence={
            x.name: divergence_of(x, _probed(allocator, kept), seed, noise)
            for x in layers
            if "divergence" in allocator.reads
        },
        tokens=1000 if "losses" in allocator.reads else 0,
        predicted={x.name: predicted_of(x, seed) for x in layers if "predicted" in allocator.reads},
        codes={x.name: codes_of(x, seed) for x in layers if "codes" in allocator.reads},
    )


def codes_of(layer: LayerRef, seed: int) -> Tensor:
    """κ of the weight, and of the product at every rank: rising with it."""
    generator = _generator(f"codes of {layer.name}", seed)
    products = generator.exponential(size=layer.paying_rank + 1).cumsum()
    return torch.from_numpy(np.append(generator.exponential() * 10, products))


def entries_of(layer: LayerRef, seed: int) -> Tensor:
    """What is lost at every level of entries, falling, and κ of those that stay, rising."""
    generator = _generator(f"entries of {layer.name}", seed)
    levels = len(level_counts(layer.out_features * layer.in_features))
    cut = generator.exponential(size=levels).cumsum()[::-1]
    return torch.from_numpy(np.stack([cut, generator.exponential(size=levels).cumsum()], axis=1))


def columns_of(layer: LayerRef, seed: int) -> Tensor:
    """The same of columns, at the levels of so many inputs."""
    generator = _generator(f"columns of {layer.name}", seed)
    levels = len(level_counts(layer.in_features))
    cut = generator.exponential(size=levels).cumsum()[::-1]
    return torch.from_numpy(np.stack([cut, generator.exponential(size=levels).cumsum()], axis=1))


def losses_of(layer: LayerRef, seed: int) -> Tensor:
    """Squared error left at each rank, from energies of random decay."""
    generator = _generator(layer.name, seed)
    count = min(layer.out_features, layer.in_features)
    energy = np.sort(generator.exponential(size=count) ** generator.uniform(0.2, 4))[::-1]
    left = np.append(energy[::-1].cumsum()[::-1], 0.0)
    return torch.from_numpy(left[: layer.paying_rank + 1].copy())


def predicted_of(layer: LayerRef, seed: int) -> Tensor:
    """KL left at each rank: falling, its steps in no order, and some of it beyond the last."""
    generator = _generator(layer.name, seed)
    steps = generator.exponential(size=layer.paying_rank + 1) ** generator.uniform(0.2, 4)
    return torch.from_numpy(steps[::-1].cumsum()[::-1].copy())


def divergence_of(
    layer: LayerRef, shares: tuple[float, ...], seed: int, noise: float = 0.0
) -> list[float]:
    """KL at each share: none at 1, rising as the share falls; ``noise`` can make it negative."""
    generator = _generator(layer.name, seed)
    size, power = generator.uniform(0.1, 5), generator.uniform(0.5, 4)
    shaken = noise * generator.normal(size=len(shares))
    return [float(size * (1 - s) ** power + e) for s, e in zip(shares, shaken, strict=True)]


def weight_and_inputs(
    shape: tuple[int, int], tokens: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, the dense model's inputs, and what compressed layers before make of them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    out_features, in_features = shape
    mix = torch.eye(in_features) + 0.5 * normal(in_features, in_features) / in_features**0.5
    dense = normal(tokens, in_features) @ mix * torch.linspace(0.3, 2, in_features)
    behind = dense + 0.3 * normal(tokens, in_features) @ mix + 0.1 * dense.roll(1, dims=1)
    return normal(out_features, in_features), dense, behind


def _probed(allocator: Allocator, kept: float) -> tuple[float, ...]:
    probe = allocator.probe(kept)
    assert isinstance(probe, Probe)
    return probe.shares


def _generator(name: str, seed: int) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32(name.encode()), seed])


def weight_and_curvature(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, a second moment and the Fisher information of its outputs."""
    weight, inputs, _ = weight_and_inputs((rows, columns), 4 * columns, seed)
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(3 * rows, rows, generator=generator, dtype=torch.float64)
    gradients *= torch.logspace(-1, 1, rows, dtype=torch.float64)
    return weight, inputs.T @ inputs / len(inputs), gradients.T @ gradients / len(gradients)
