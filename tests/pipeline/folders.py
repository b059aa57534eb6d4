"""Write compressed folders of tiny models with random factors, and the same models in memory."""

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress_core.hf.checkpoint import Checkpoint
from compress_core.hf.factored import factorise
from compress_core.hf.folder import FactoredWeights, FolderSummary, write_folder
from tests.families import linear_names

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Pair:
    """A dense folder, its compressed one, and the compressed model as built in memory."""

    dense: Path
    small: Path
    summary: FolderSummary
    reference: Any


def random_factors(model: Any, seed: int = 0) -> Factors:
    """Factors u (out, rank), v (rank, in) for every linear layer, three quarters of what pays."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name in linear_names(model):
        layer = model.get_submodule(name)
        shape = layer.weight.shape
        rows, columns = shape[::-1] if type(layer).__name__ == "Conv1D" else shape
        rank = rows * columns // (rows + columns) * 3 // 4
        u = torch.randn(rows, rank, generator=generator) * rank**-0.5
        v = torch.randn(rank, columns, generator=generator) * columns**-0.5
        factors[name] = (u.to(model.dtype), v.to(model.dtype))
    return factors


def in_memory(model: Any, factors: Factors) -> Any:
    """A copy of the model with the factors in place of the weights."""
    model = copy.deepcopy(model)
    factorise(model, {name: {"rank": u.shape[1]} for name, (u, _) in factors.items()})
    with torch.no_grad():
        for name, (u, v) in factors.items():
            model.get_submodule(name).weight.copy_(u)
            model.get_submodule(name).factor_in.copy_(v)
    return model


def as_layers(
    checkpoint: Checkpoint, factors: Factors, base_prefix: str
) -> Iterator[FactoredWeights]:
    """The factors as `write_folder` takes them, one at a time."""
    for name, (u, v) in factors.items():
        yield FactoredWeights(name, checkpoint.key(f"{name}.weight", base_prefix), u, v)


def write_small(
    model: Any, dense: Path, small: Path, factors: Factors, shard: int = 5_000_000_000
) -> FolderSummary:
    """Write the compressed folder of a model whose dense folder is there already."""
    checkpoint = Checkpoint(dense)
    return write_folder(
        small,
        checkpoint,
        as_layers(checkpoint, factors, model.base_model_prefix),
        architecture=type(model).__name__,
        base_class=type(model.base_model).__name__,
        base_prefix=model.base_model_prefix,
        max_shard_bytes=shard,
    )


def make_pair(model: Any, folder: Path, *, prefixless: bool = False) -> Pair:
    """Write both folders of a model, the dense one without the base model's prefix if wanted."""
    dense, small = folder / "dense", folder / "small"
    (model.base_model if prefixless else model).save_pretrained(dense)
    if prefixless:
        edit_config(dense, architectures=[type(model).__name__])
    factors = random_factors(model)
    summary = write_small(model, dense, small, factors)
    return Pair(dense, small, summary, in_memory(model, factors))


def edit_config(folder: Path, **entries: object) -> None:
    """Overwrite entries of a folder's config.json; None removes one."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **entries}
    file.write_text(json.dumps({name: v for name, v in config.items() if v is not None}))
