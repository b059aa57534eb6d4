"""Which stored tensor every parameter of a model is loaded from: what transformers makes of names.

transformers renames keys, adds and takes off prefixes and ties weights as it loads. It is asked
what it would do with the keys at hand; whoever reads a folder uses the answer.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

# What torch.compile, DataParallel, FSDP and activation checkpointing put into names.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

Same = Callable[[str, str], bool]  # whether two keys hold equal tensors


@dataclass(frozen=True)
class Binding:
    """What a model is loaded from.

    Attributes:
        stored: Name in the model's `state_dict` to the key in the files; tied ones share a key.
        missing: Names that the files have nothing for.
        converted: Names that are computed from tensors of another layout, so that no key is theirs.
        wrappers: Patterns of what is taken off the keys before transformers sees them.
    """

    stored: Mapping[str, str]
    missing: tuple[str, ...]
    converted: tuple[str, ...]
    wrappers: tuple[str, ...]


def bind(model: Any, keys: Collection[str], same: Same = lambda one, other: False) -> Binding:
    """What `from_pretrained` loads every parameter and stored buffer of `model` from.

    Prefixes that no transformers knows are taken off where that makes the model whole;
    :func:`key_mapping` tells `from_pretrained` to do the same.

    Args:
        model: The model, without weights.
        keys: All keys in its files.
        same: Asked where two keys of tied weights are stored; they stay apart if they differ.
    """
    state = dict(model.state_dict())
    binding = _bind(model, state, keys, same, ())
    if binding.missing:
        tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
        for wrappers in _wrappers(set(binding.missing) - tied, keys):
            other = _bind(model, state, keys, same, wrappers)
            of_one = all(re.search(wrappers[0], key) for key in other.stored.values())
            if of_one and not other.missing and not other.converted:
                return other
    return binding


def key_mapping(wrappers: Iterable[str]) -> dict[str, str] | None:
    """What `from_pretrained` is given as `key_mapping`, so that it takes the wrappers off too."""
    return dict.fromkeys(wrappers, "") or None


def unwrapped(key: str, wrappers: Iterable[str]) -> str:
    """The key as plain transformers understands it."""
    for pattern in wrappers:
        key = re.sub(pattern, "", key, count=1)
    return key


def _bind(
    model: Any,
    state: dict[str, Tensor],
    keys: Collection[str],
    same: Same,
    wrappers: tuple[str, ...],
) -> Binding:
    stored: dict[str, str] = {}
    converted: set[str] = set()
    for key, name, pattern in _renamed(model, state, keys, wrappers):
        if name in state and pattern is not None:
            converted.add(name)
        elif name in state:
            stored.setdefault(name, key)  # of several keys transformers takes the first
    _tie(stored, model.all_tied_weights_keys, same)
    missing = set(state) - set(stored) - converted
    if converted and missing:  # one tensor may become several; which, only the conversion knows
        converted, missing = converted | missing, set()
    needed = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    ignored = [re.compile(text) for text in model._keys_to_ignore_on_load_missing or ()]
    return Binding(
        stored,
        tuple(
            name
            for name in state
            if name in missing
            and (name in needed or not any(pattern.search(name) for pattern in ignored))
        ),
        tuple(name for name in state if name in converted),
        wrappers,
    )


def _renamed(
    model: Any, state: dict[str, Tensor], keys: Iterable[str], wrappers: tuple[str, ...]
) -> Iterator[tuple[str, str, str | None]]:
    """Key, the name it goes by, and the pattern of a conversion: as loading does it."""
    rules = get_model_conversion_mapping(model, key_mapping(wrappers))
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    prefix = model.base_model_prefix
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        yield key, name, pattern


def _tie(stored: dict[str, str], tied: Mapping[str, str], same: Same) -> None:
    """Lets tied names share a key: of a source, or of whichever of its targets is stored."""
    for target, source in tied.items():
        others = (name for name, of in tied.items() if of == source)
        owner = next((name for name in (source, *others) if name in stored), None)
        if owner is None:
            continue
        key = stored.setdefault(source, stored[owner])
        if target not in stored or (stored[target] != key and same(stored[target], key)):
            stored[target] = key


def _wrappers(missing: Collection[str], keys: Collection[str]) -> Iterator[tuple[str, ...]]:
    """What may be taken off the keys: known wrappers, or the one prefix of all that is missing."""
    words = "|".join(_WRAPPERS)
    first = rf"^(?:(?:module|{words})\.)*"
    inner = (rf"(?<=\.){word}\." for word in _WRAPPERS)
    yield (first, *(pattern for pattern in inner if any(re.search(pattern, k) for k in keys)))
    prefixes = None
    for name in missing:
        ends = {key[: -len(name)] for key in keys if key.endswith("." + name)}
        prefixes = ends if prefixes is None else prefixes & ends
    if prefixes and len(prefixes) == 1:  # of two, nobody could say which is the model
        yield (f"^{re.escape(prefixes.pop())}",)
