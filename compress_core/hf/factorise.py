"""Puts empty factored layers where a checkpoint has them, and checks that it filled them.

Like `factored.py` it needs PyTorch alone, and its text follows that file's in a model folder.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from compress_core.hf.factored import FactoredLinear, _unset, is_column_index, is_factored, pays
from compress_core.hf.quantised_linear import BITS, QuantisedLinear
from compress_core.hf.sparse_linear import SparseLinear
from compress_core.quantise import CODES
from compress_core.sparse import PLACES

FORMAT_VERSION = 3

Entry = Mapping[str, Any]

_PARTS = ("weight", "factor_in", "columns", "column_index", "sparse_values", *PLACES)
_PARTS_IN_8_BITS = ("rest_out", "rest_in", *CODES)


def factorise(
    model: nn.Module,
    modules: Mapping[str, Entry],
    prefix: str = "",
    format_version: int = FORMAT_VERSION,
) -> nn.Module:
    """Replace the named linear layers by empty FactoredLinear ones, in place.

    Args:
        model: The model, or its base model together with `prefix`; may be on the meta device.
        modules: Layer name -> entry, names as in the whole causal model. An entry has "rank", with
            "columns", how many are kept, or "factor_in", the layer whose in-factor is used, or
            "nonzeros", how many sparse entries there are, or "bits", 8, for factors in 8 bits;
            "bias" where the dense layer had none.
        prefix: What the names carry in front when `model` is the base model, like "model.". Layers
            outside the base model are then left out.
        format_version: Version of the checkpoint format that `modules` comes from.

    Returns:
        The same model. Layers that are factored already stay as they are.

    Raises:
        ValueError: The format is newer than this code, a name is unknown or not a linear layer, or
            an entry does not fit its layer or would cost as much as the dense weight.
    """
    check_version(format_version)
    entries = {name: _entry(entry) for name, entry in modules.items()}
    paths = {name: name[len(prefix) :] for name in entries if name.startswith(prefix)}
    dense: dict[str, Any] = {name: _linear(model, path) for name, path in paths.items()}
    check_layers(entries, {name: _sizes(layer) for name, layer in dense.items()})
    for name, layer in dense.items():
        if "bias" in entries[name] and layer.bias is not None and not is_factored(layer):
            raise ValueError(f"layer {name!r} has a bias already: its entry must not add one")
    for name in sorted(paths, key=lambda name: "factor_in" in entries[name]):  # owners first
        module = dense[name]
        if is_factored(module):
            if (had := _entry(_settings(module))) != entries[name]:
                raise ValueError(f"layer {name!r} has {had} already, not {entries[name]}")
            continue
        layer = _empty_like(module, entries[name])
        layer.layer_name = name
        if layer.shared_with:
            owner: Any = model.get_submodule(paths[layer.shared_with])
            layer.factor_in = owner.factor_in
        model.set_submodule(paths[name], layer)
    return model


def factorise_from_config(model: nn.Module, config: Any, prefix: str = "") -> None:
    """Apply `factorise` with what a model's config says, or nothing where it says nothing."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return
    settings = settings if isinstance(settings, Mapping) else settings.to_dict()
    factorise(model, settings["modules"], prefix, settings["format_version"])


def check_version(format_version: int) -> None:
    """Raise ValueError for a checkpoint format that is newer than this code."""
    if format_version > FORMAT_VERSION:
        raise ValueError(
            f"the checkpoint has eigenpress format {format_version}, this code reads up to "
            f"{FORMAT_VERSION}: update eigenpress, or load with the model's own code"
        )


def check_layers(entries: Mapping[str, Entry], sizes: Mapping[str, tuple[int, int]]) -> None:
    """Raise ValueError unless every entry fits its layer and costs less than what it replaces.

    Args:
        entries: Layer name -> entry, as in `factorise`.
        sizes: Layer name -> (out, in) of its dense weight, for the layers at hand.
    """
    rows = {name: out_features for name, (out_features, _) in sizes.items()}
    for name, (_, in_features) in sizes.items():
        entry = entries[name]
        if "factor_in" in entry:
            owner = entry["factor_in"]
            reason = _why_not(entry, entries.get(owner), in_features, sizes.get(owner))
            if reason:
                raise ValueError(f"layer {name!r} cannot use the in-factor of {owner!r}: {reason}")
            rows[owner] += rows.pop(name)
    for name, out_features in rows.items():
        entry = entries[name]
        columns, nonzeros = entry.get("columns", 0), entry.get("nonzeros", 0)
        bits = entry.get("bits", 16)
        if columns and nonzeros:
            raise ValueError(f"layer {name!r} has both kept columns and sparse entries: one only")
        if "bits" in entry and bits != BITS:
            raise ValueError(f"layer {name!r} has factors in {bits} bits: this code reads {BITS}")
        if "bits" in entry and (columns or nonzeros):
            raise ValueError(
                f"layer {name!r} has 8-bit factors beside columns or entries: one only"
            )
        new_bias = bool(entry.get("bias"))
        in_features, rank = sizes[name][1], entry["rank"]
        if not pays(out_features, in_features, rank, columns, nonzeros, new_bias, bits):
            beside = f" and {columns} columns" if columns else ""
            beside += f" and {nonzeros} entries" if nonzeros else ""
            raise ValueError(
                f"layer {name!r} ({out_features}, {sizes[name][1]}) cannot have rank "
                f"{entry['rank']}{beside}: what is stored would not be smaller than the dense "
                "weight; leave it dense"
            )


def shared_factors(model: nn.Module) -> dict[str, str]:
    """Key of every in-factor that is another layer's -> that layer's key, as `model` has them.

    It goes by what the layers know: while a checkpoint is loaded, identity says nothing.
    """
    layers = {path: module for path, module in model.named_modules() if is_factored(module)}
    paths = {getattr(layer, "layer_name", ""): path for path, layer in layers.items()}
    owners = {path: getattr(layer, "shared_with", None) for path, layer in layers.items()}
    return {
        f"{path}.factor_in": f"{paths[owner]}.factor_in"
        for path, owner in owners.items()
        if owner in paths
    }


def stored_keys(model: nn.Module) -> Iterator[str]:
    """The keys of all that the entries call for, which a checkpoint of `model` must have."""
    shared = shared_factors(model)
    for path, module in model.named_modules():
        if is_factored(module):
            bias = ("bias",) if getattr(module, "new_bias", False) else ()
            for part in (*_PARTS, *_PARTS_IN_8_BITS, *bias):
                key = f"{path}.{part}"
                if getattr(module, part, None) is not None and key not in shared:
                    yield key


def require_factors(model: nn.Module, missing: Iterable[str]) -> None:
    """Raise ValueError if anything that entries call for is missing: transformers would warn."""
    lost = sorted(set(missing).intersection(stored_keys(model)))
    if lost:
        raise ValueError(
            f"the checkpoint has no {lost[0]} ({len(lost)} of its factors, columns and entries "
            "missing): it is incomplete, get the model again"
        )


def check_indices(model: nn.Module) -> None:
    """Raise ValueError if loaded indices or places name nothing; give others their dtype in memory.

    Loaders put int16 where int32 was.
    """
    for path, module in model.named_modules():
        if not is_factored(module) or module.weight.is_meta:
            continue
        damaged = "the checkpoint is damaged, get the model again"
        if (index := getattr(module, "column_index", None)) is not None:
            if not is_column_index(index, module.in_features):
                raise ValueError(f"{path}.column_index is no ascending list of inputs: {damaged}")
            module.column_index = index.to(torch.int32)
        if isinstance(module, SparseLinear):
            try:
                module.check_places()
            except ValueError as error:
                raise ValueError(f"{path}.sparse_values: {error}: {damaged}") from error


def _why_not(
    entry: Entry, owner: Entry | None, in_features: int, owner_sizes: tuple[int, int] | None
) -> str | None:
    if owner is None or owner_sizes is None:
        return "that layer is not in the list"
    if "factor_in" in owner:
        return "that layer has none of its own"
    if {"columns", "nonzeros", "bits"} & (entry.keys() | owner.keys()):
        return "a layer that keeps columns or has sparse entries or 8-bit codes shares no factor"
    want, has = (entry["rank"], in_features), (owner["rank"], owner_sizes[1])
    return None if want == has else f"that one is {has}, not {want}"


def _entry(settings: Entry) -> dict[str, Any]:
    """An entry with nothing in it that says nothing, so that equal ones are equal."""
    entry: dict[str, Any] = {"rank": int(settings["rank"])}
    entry |= {
        key: int(settings[key]) for key in ("columns", "nonzeros", "bits") if settings.get(key)
    }
    if settings.get("factor_in"):
        entry["factor_in"] = settings["factor_in"]
    if settings.get("bias"):
        entry["bias"] = True
    return entry


def _settings(layer: FactoredLinear) -> Entry:
    # Layers of older formats lack some of these.
    return {
        "rank": layer.rank,
        "columns": getattr(layer, "column_count", 0),
        "nonzeros": getattr(layer, "nonzeros", 0),
        "factor_in": getattr(layer, "shared_with", None),
        "bias": getattr(layer, "new_bias", False),
        "bits": BITS if type(layer).__name__ == QuantisedLinear.__name__ else None,
    }


def _linear(model: nn.Module, path: str) -> nn.Module:
    try:
        layer = model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"{type(model).__name__} has no layer {path!r} to factorise") from None
    if type(layer).__name__ != "Conv1D" and not isinstance(layer, nn.Linear):
        raise ValueError(f"layer {path!r} is a {type(layer).__name__}, not a linear layer")
    return layer


def _sizes(layer: Any) -> tuple[int, int]:
    if is_factored(layer):
        return layer.out_features, layer.in_features
    rows, columns = layer.weight.shape
    return (columns, rows) if type(layer).__name__ == "Conv1D" else (rows, columns)


def _empty_like(dense: Any, entry: Entry) -> FactoredLinear:
    out_features, in_features = _sizes(dense)
    sizes = in_features, out_features, entry["rank"]
    options = {
        "bias": False,
        "transposed": type(dense).__name__ == "Conv1D",
        "device": dense.weight.device,
        "dtype": dense.weight.dtype,
    }
    if "nonzeros" in entry:
        layer: FactoredLinear = SparseLinear(*sizes, entry["nonzeros"], **options)
    elif "bits" in entry:
        layer = QuantisedLinear(*sizes, **options)
    else:
        layer = FactoredLinear(*sizes, columns=entry.get("columns", 0), **options)
    layer.bias = dense.bias
    if "bias" in entry:
        layer.new_bias = True
        layer.bias = _unset(out_features, device=dense.weight.device, dtype=dense.weight.dtype)
    layer.shared_with = entry.get("factor_in")
    return layer.train(dense.training)
