"""Write compressed folders of tiny models with random factors, and the same models in memory."""

import copy
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compress_core.decompose import LowRank
from compress_core.folder.swap import swap_layers
from compress_core.folder.write import CompressedWeights, FolderSummary, write_folder
from compress_core.forms.kinds import SLOTS
from compress_core.hf.checkpoint import Checkpoint
from compress_core.hf.layout import inspect_model
from tests.families import linear_names, tiny_model, token_batch
from tests.pipeline.contents import sizes_of_layer, stores
from tests.pipeline.forking import run_script

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]

BATCH = token_batch()
both_ways = pytest.mark.parametrize("trust", [False, True], ids=["stock", "remote"])


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
        rows, columns = sizes_of_layer(layer)
        rank = rows * columns // (rows + columns) * 3 // 4
        u = torch.randn(rows, rank, generator=generator) * rank**-0.5
        v = torch.randn(rank, columns, generator=generator) * columns**-0.5
        factors[name] = (u.to(model.dtype), v.to(model.dtype))
    return factors


def in_memory(model: Any, factors: Factors) -> Any:
    """A copy of the model with the factors in place of the weights."""
    model = copy.deepcopy(model)
    swap_layers(model, {name: {"rank": u.shape[1]} for name, (u, _) in factors.items()})
    with torch.no_grad():
        for name, (u, v) in factors.items():
            model.get_submodule(name).weight.copy_(u)
            model.get_submodule(name).factor_in.copy_(v)
    return model


def in_memory_layers(model: Any, layers: Iterable[CompressedWeights]) -> Any:
    """A copy of the model with what the layers hold in place of the weights."""
    model, layers = copy.deepcopy(model), list(layers)
    entries: dict[str, dict[str, Any]] = {}
    for layer in layers:
        entries[layer.name] = dict(layer.entry)
        if layer.bias is not None and model.get_submodule(layer.name).bias is None:
            entries[layer.name]["bias"] = True
    swap_layers(model, entries)
    with torch.no_grad():
        for layer in layers:
            module = model.get_submodule(layer.name)
            if layer.bias is not None:
                old = 0 if "bias" in entries[layer.name] else module.bias.float()
                module.bias.copy_(layer.bias.float() + old)
            for part, tensor in layer.tensors.items():
                getattr(module, part).copy_(SLOTS[part].load(tensor))
    return model


def as_layers(factors: Factors) -> Iterator[CompressedWeights]:
    """The factors as `write_folder` takes them, one at a time."""
    for name, (u, v) in factors.items():
        yield stores(name, LowRank(u, v), u.dtype)


def write_small(
    dense: Path, small: Path, factors: Factors, shard: int = 5_000_000_000
) -> FolderSummary:
    """Write the compressed folder of a model whose dense folder is there already."""
    return write_layers(dense, small, as_layers(factors), shard)


def write_layers(
    dense: Path, small: Path, layers: Iterable[CompressedWeights], shard: int = 5_000_000_000
) -> FolderSummary:
    """Write the compressed folder of layers, asking for nothing but the dense folder."""
    checkpoint = Checkpoint(dense)
    return write_folder(small, checkpoint, layers, inspect_model(checkpoint), shard)


def make_pair(
    model: Any,
    folder: Path,
    *,
    prefixless: bool = False,
    layers: Callable[[Any], list[CompressedWeights]] | None = None,
) -> Pair:
    """Write both folders of a model, the dense one without the base model's prefix if wanted.

    Args:
        model: The dense model.
        folder: Where both go.
        prefixless: Whether the dense one is saved as the base model.
        layers: Makes the layers' contents; plain random factors by default.
    """
    dense, small = folder / "dense", folder / "small"
    (model.base_model if prefixless else model).save_pretrained(dense)
    if prefixless:
        edit_config(dense, architectures=[type(model).__name__])
    if layers is None:
        factors = random_factors(model)
        summary = write_small(dense, small, factors)
        return Pair(dense, small, summary, in_memory(model, factors))
    made = layers(model)
    summary = write_layers(dense, small, made)
    return Pair(dense, small, summary, in_memory_layers(model, made))


def make_pairs(
    root: Path, cases: Iterable[str], layers: Callable[[Any], list[CompressedWeights]] | None = None
) -> dict[str, Pair]:
    """Both folders of every case: a family's name, or that with ``_prefixless`` behind it."""
    return {
        case: make_pair(
            tiny_model(case.removesuffix("_prefixless")),
            root / case,
            prefixless=case.endswith("_prefixless"),
            layers=layers,
        )
        for case in cases
    }


def load(folder: Path, trust: bool = False, **options: Any) -> Any:
    """A folder's model: the stock class, or with the folder's own code."""
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust, **options)


def logits_of(model: Any) -> torch.Tensor:
    """What a model says of the batch."""
    with torch.no_grad():
        return model(BATCH).logits


def edit_config(folder: Path, **entries: object) -> None:
    """Overwrite entries of a folder's config.json; None removes one."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **entries}
    file.write_text(json.dumps({name: v for name, v in config.items() if v is not None}))


def entries_of(folder: Path) -> dict[str, Any]:
    """What config.json says of every compressed layer."""
    return json.loads((folder / "config.json").read_text())["quantization_config"]["modules"]


def shared_of(folder: Path) -> dict[str, str]:
    """Layers that use another's in-factor -> that layer."""
    entries = entries_of(folder)
    return {name: entry["factor_in"] for name, entry in entries.items() if "factor_in" in entry}


def expect_shared(model: Any, folder: Path, prefix: str = "") -> None:
    """A model loaded from `folder` has one Parameter for every in-factor that is shared."""
    shared = shared_of(folder)
    assert len(shared) > 2
    for name, owner in shared.items():
        layer, other = (model.get_submodule(n.removeprefix(prefix)) for n in (name, owner))
        assert layer.factor_in is other.factor_in


def expect_same_tensors(folder: Path, other: Path) -> None:
    """Two folders of one file each hold the same tensors under the same keys."""
    one, two = (load_file(f / "model.safetensors") for f in (folder, other))
    assert one.keys() == two.keys()
    for key in one:
        assert one[key].dtype == two[key].dtype and torch.equal(one[key], two[key])


def without(folder: Path, target: Path, *keys: str, **changed: torch.Tensor) -> Path:
    """A copy of a compressed folder that lacks some tensors or has others in their place."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(target / "model.safetensors")
    kept = {key: tensor for key, tensor in tensors.items() if key not in keys} | changed
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    return target


def without_package(
    pairs: dict[str, Pair], cases: Iterable[str], lost: str, folder: Path
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What a process without eigenpress finds in the folders of some cases, checked to the bit.

    Args:
        pairs: Every case's folders.
        cases: Those that it loads and saves again, under their names in ``folder``.
        lost: Key of the tensor that a damaged copy of the Llama lacks.
        folder: Where it writes.

    Returns:
        Its facts, and its logits by case.
    """
    damaged = str(without(pairs["llama"].small, folder / "damaged", lost))
    asked = {
        "batch": BATCH.tolist(),
        "families": {case: str(pairs[case].small) for case in cases},
        "resave": {case: str(folder / case) for case in cases},
        "damaged": damaged,
        "newer": damaged,
    }
    run_without_package(folder, asked)
    facts = json.loads((folder / "facts.json").read_text())
    logits = load_file(folder / "logits.safetensors")
    for case in cases:
        assert torch.equal(logits[case], logits_of(pairs[case].reference))
        assert "mismatch" in facts["guard"][case]
        expect_same_tensors(folder / case, pairs[case].small)
    assert f"no {lost}" in facts["damaged"]
    return facts, logits


def run_without_package(root: Path, request: dict[str, Any]) -> None:
    """Run `without_package.py` on a request, in a process that cannot import our package."""
    (root / "request.json").write_text(json.dumps(request))
    script = (
        "import runpy, sys; sys.modules['compress_core'] = None; "
        "runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    )
    run_script(
        script, Path(__file__).with_name("without_package.py"), root / "request.json", folder=root
    )
