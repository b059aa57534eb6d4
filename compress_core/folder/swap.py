"""Puts empty compressed layers where a checkpoint has them, and checks that it filled them.

It needs PyTorch alone, and its text follows that of the parts in a model folder.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from compress_core.forms.coded import OF_CODES
from compress_core.forms.kinds import KINDS, OF_SUMS, plain_entry, sizes_of, why_not
from compress_core.forms.linear import CompressedLinear, is_compressed, is_of_old_copy, unset
from compress_core.forms.part import Entry

FORMAT_VERSION = max(OF_SUMS, OF_CODES, *(kind.version for kind in KINDS))
SHARED = "factor_in"  # the tensor of one layer that others may use


def swap_layers(
    model: nn.Module,
    modules: Mapping[str, Entry],
    prefix: str = "",
    format_version: int = FORMAT_VERSION,
) -> nn.Module:
    """Replace the named linear layers by empty compressed ones, in place.

    Args:
        model: The model, or its base model together with `prefix`; may be on the meta device.
        modules: Layer name -> entry, names as in the whole causal model. Of what an entry has every
            kind of part knows its own; "bias" is where the dense layer had none.
        prefix: What the names carry in front when `model` is the base model, like "model.". Layers
            outside the base model are then left out.
        format_version: Version of the checkpoint format that `modules` comes from.

    Returns:
        The same model. Layers that are compressed already stay as they are, but for those that the
        code in an old folder made, which know less.

    Raises:
        ValueError: The format is newer than this code, a name is unknown or not a linear layer, or
            an entry does not fit its layer or would cost as much as the dense weight.
    """
    check_version(format_version)
    entries = plain_entries(modules)
    paths = {name: name[len(prefix) :] for name in entries if name.startswith(prefix)}
    dense: dict[str, Any] = {name: _linear(model, path) for name, path in paths.items()}
    check_layers(entries, {name: _sizes(layer) for name, layer in dense.items()})
    for name, layer in dense.items():
        given = layer.bias is not None and not is_compressed(layer) and not is_of_old_copy(layer)
        if given and "bias" in entries[name]:
            raise ValueError(f"layer {name!r} has a bias already: its entry must not add one")
    for name in sorted(paths, key=lambda name: SHARED in entries[name]):  # owners first
        module, entry = dense[name], entries[name]
        if is_compressed(module):
            if module.entry != entry:
                raise ValueError(f"layer {name!r} has {module.entry} already, not {entry}")
            continue
        layer = _empty_like(module, entry)
        layer.layer_name = name
        if SHARED in entry:
            setattr(layer, SHARED, getattr(model.get_submodule(paths[entry[SHARED]]), SHARED))
        model.set_submodule(paths[name], layer)
    return model


def swap_from_config(model: nn.Module, config: Any, prefix: str = "") -> None:
    """Apply `swap_layers` with what a model's config says, or nothing where it says nothing."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return
    settings = settings if isinstance(settings, Mapping) else settings.to_dict()
    swap_layers(model, settings["modules"], prefix, settings["format_version"])


def check_version(format_version: int) -> None:
    """Raise ValueError for a checkpoint format that is newer than this code, or none."""
    if type(format_version) is not int or format_version < 1:
        raise ValueError(f"no checkpoint has the format {format_version!r}: get the model again")
    if format_version > FORMAT_VERSION:
        raise ValueError(
            f"the checkpoint has eigenpress format {format_version}, this code reads up to "
            f"{FORMAT_VERSION}: update eigenpress, or load with the model's own code"
        )


def plain_entries(modules: Any) -> dict[str, dict[str, Any]]:
    """The entries of a list of layers, each with nothing in it that says nothing.

    Raises:
        ValueError: It is no such list.
    """
    if not isinstance(modules, Mapping):
        raise ValueError(f"the list of layers is an object of entries by name, not {modules!r}")
    found = {}
    for name, entry in modules.items():
        try:
            found[str(name)] = plain_entry(entry)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from None
    return found


def check_layers(entries: Mapping[str, Entry], sizes: Mapping[str, tuple[int, int]]) -> None:
    """Raise ValueError unless every entry fits its layer and costs less than what it replaces.

    Args:
        entries: Layer name -> entry, as in `swap_layers`.
        sizes: Layer name -> (out, in) of its dense weight, for the layers at hand.
    """
    rows = {name: out_features for name, (out_features, _) in sizes.items()}
    for name, (_, in_features) in sizes.items():
        entry = entries[name]
        if SHARED in entry:
            owner = entry[SHARED]
            reason = _why_not_shared(entry, entries.get(owner), in_features, sizes.get(owner))
            if reason:
                raise ValueError(f"layer {name!r} cannot use the in-factor of {owner!r}: {reason}")
            rows[owner] += rows.pop(name)
    for name, out_features in rows.items():
        reason = why_not(entries[name], sizes_of(out_features, sizes[name][1], entries[name]))
        if reason:
            raise ValueError(f"layer {name!r}: {reason}")


def shared_factors(model: nn.Module) -> dict[str, str]:
    """Key of every in-factor that is another layer's -> that layer's key, as `model` has them.

    It goes by what the layers know: while a checkpoint is loaded, identity says nothing.
    """
    layers = {path: module for path, module in model.named_modules() if is_compressed(module)}
    paths = {layer.layer_name: path for path, layer in layers.items()}
    owners = {path: layer.shared_with for path, layer in layers.items()}
    return {
        f"{path}.{SHARED}": f"{paths[owner]}.{SHARED}"
        for path, owner in owners.items()
        if owner in paths
    }


def stored_keys(model: nn.Module) -> Iterator[str]:
    """The keys of all that the entries call for, which a checkpoint of `model` must have."""
    shared = shared_factors(model)
    for path, module in model.named_modules():
        if isinstance(module, CompressedLinear):
            bias = ("bias",) if "bias" in module.entry else ()
            for part in (*module.parts, *bias):
                if (key := f"{path}.{part}") not in shared:
                    yield key


def require_parts(model: nn.Module, missing: Iterable[str]) -> None:
    """Raise ValueError if anything that entries call for is missing: transformers would warn."""
    lost = sorted(set(missing).intersection(stored_keys(model)))
    if lost:
        raise ValueError(
            f"the checkpoint has no {lost[0]} ({len(lost)} tensors of compressed layers missing): "
            "it is incomplete, get the model again"
        )


def settle_layers(model: nn.Module) -> None:
    """Raise ValueError if loaded integers name nothing; give others their dtype in memory."""
    for path, module in model.named_modules():
        if isinstance(module, CompressedLinear) and not module.weight.is_meta:
            try:
                module.settle()
            except ValueError as error:
                raise ValueError(
                    f"{path}.{error}: the checkpoint is damaged, get the model again"
                ) from error


def _why_not_shared(
    entry: Entry, owner: Entry | None, in_features: int, owner_sizes: tuple[int, int] | None
) -> str | None:
    if owner is None or owner_sizes is None:
        return "that layer is not in the list"
    if SHARED in owner:
        return "that layer has none of its own"
    if odd := sorted((entry.keys() | owner.keys()) - {"rank", "bias", SHARED}):
        return f"a layer that stores more than factors ({odd[0]}) shares none"
    want, has = (entry["rank"], in_features), (owner["rank"], owner_sizes[1])
    return None if want == has else f"that one is {has}, not {want}"


def _linear(model: nn.Module, path: str) -> nn.Module:
    try:
        layer = model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"{type(model).__name__} has no layer {path!r} to compress") from None
    if type(layer).__name__ != "Conv1D" and not isinstance(layer, nn.Linear):
        raise ValueError(f"layer {path!r} is a {type(layer).__name__}, not a linear layer")
    return layer


def _sizes(layer: Any) -> tuple[int, int]:
    if is_compressed(layer) or is_of_old_copy(layer):
        return layer.out_features, layer.in_features
    rows, columns = layer.weight.shape
    return (columns, rows) if type(layer).__name__ == "Conv1D" else (rows, columns)


def _empty_like(dense: Any, entry: Entry) -> CompressedLinear:
    out_features, in_features = _sizes(dense)
    like: dict[str, Any] = {"device": dense.weight.device, "dtype": dense.weight.dtype}
    conv = type(dense).__name__ == "Conv1D" or getattr(dense, "transposed", False)
    layer = CompressedLinear(in_features, out_features, entry, bias=False, transposed=conv, **like)
    layer.bias = unset(out_features, **like) if "bias" in entry else dense.bias
    return layer.train(dense.training)
