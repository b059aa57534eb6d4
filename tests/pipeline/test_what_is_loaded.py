"""A folder is what transformers makes of it: names, ties, prefixes; whole, or refused."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3Config

from compress_core.errors import ModelError
from compress_core.folder.export import to_dense
from compress_core.folder.write import count_parameters, write_folder
from compress_core.hf.checkpoint import Checkpoint
from compress_core.hf.layout import inspect_model
from storage.digests import DigestCache
from tasks.engine.dense_model import DenseModel
from tests.code_cache import code_cache_at
from tests.contracts.more_families import gemma4
from tests.families import FAMILIES, tiny_model
from tests.pipeline.folders import as_layers, edit_config

Tensors = dict[str, Tensor]
Change = Callable[[Tensors], Tensors]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q_PROJ, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"


def gemma3() -> Any:
    """A model of texts and images whose files have other names than its parameters."""
    torch.manual_seed(0)
    text = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96}
    vision = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48}
    config = Gemma3Config(
        text_config=text | heads,
        vision_config=vision | {"num_attention_heads": 4, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    return AutoModelForCausalLM.from_config(config)


OTHERS: dict[str, Callable[[], Any]] = {
    "gemma3 wrapper": gemma3,
    "gemma4": lambda: AutoModelForCausalLM.from_config(gemma4(shared=0)),
}


def save(family: str, folder: Path, change: Change | None = None, **entries: Any) -> Path:
    """A family's folder, its tensors and its config.json changed."""
    model: Any = OTHERS[family]() if family in OTHERS else tiny_model(family)
    model.save_pretrained(folder)
    if change is not None:
        file = folder / "model.safetensors"
        tensors = change({name: tensor.clone() for name, tensor in load_file(file).items()})
        file.unlink()
        save_file(tensors, file, metadata={"format": "pt"})
    if entries:
        edit_config(folder, **entries)
    return folder


def without(*names: str) -> Change:
    return lambda tensors: {k: v for k, v in tensors.items() if not k.endswith(names)}


def prefixed(prefix: str) -> Change:
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def renamed(old: str, new: str) -> Change:
    return lambda tensors: {name.replace(old, new): t for name, t in tensors.items()}


def also(**more: Callable[[Tensors], Tensor]) -> Change:
    return lambda tensors: (
        tensors | {name.replace("__", "."): make(tensors) for name, make in more.items()}
    )


def cast(dtype: torch.dtype) -> Change:
    return lambda tensors: {k: v.to(dtype) if v.ndim == 2 else v for k, v in tensors.items()}


def masks(tensors: Tensors) -> Tensors:
    """What old versions stored of GPT-2's attention."""
    old = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in range(2)}
    return tensors | old | {"transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        inspect_model(Checkpoint(folder))
    assert "\n" not in str(caught.value) and "save it again" not in str(caught.value)
    return str(caught.value)


REFUSED: dict[str, tuple[str, Change | None, dict[str, Any], str]] = {
    "head": ("llama", without(HEAD), {}, f"lack 1 of .* {HEAD}, .*random numbers.*language head"),
    "reward model": (
        "llama",
        lambda t: without(HEAD)(t) | {"score.weight": torch.ones(1, 32)},
        {"architectures": ["LlamaForSequenceClassification"]},
        "like LlamaForSequenceClassification, has no language head.*tie_word_embeddings",
    ),
    "head's bias": ("phi", without("lm_head.bias"), {}, "lack 1 of .* lm_head.bias, "),
    "norm": ("llama", without(NORM), {}, f"lack 1 of .* {NORM}, .*get the model again"),
    "norm in a block": ("llama", without("layers.1.input_layernorm.weight"), {}, "lack 1 of"),
    "buffer": ("gemma4", without("layers.0.layer_scalar"), {}, r"lack 1 of .*0\.layer_scalar, "),
    "embedding of tied": ("llama_tied", without(EMBEDDING), {}, f"lack 2 of .* {EMBEDDING}"),
    "a layer": ("llama", None, {"num_hidden_layers": 3}, "lack 9 of .*config.json that was saved"),
    "two models": (
        "llama",
        lambda t: (
            prefixed("actor.")(t)
            | prefixed("critic.")({name: tensor.clone() for name, tensor in t.items()})
        ),
        {},
        r"42 of other names, first actor\.lm_head\.weight; .*model-format\.md shows",
    ),
    "adapter inside": (
        "llama",
        lambda t: renamed("q_proj.", "q_proj.base_layer.")(t) | {"a.lora_A.weight": torch.ones(2)},
        {},
        "of an adapter that is not merged",
    ),
    "vocabulary": ("llama", None, {"vocab_size": 88}, r"\(96, 32\) in .* \(88, 32\).*to 96$"),
    "width": ("llama", None, {"intermediate_size": 44}, r"and 5 more\) is .* by config\.json"),
    "shape of a norm": (
        "llama",
        lambda t: t | {NORM: torch.ones(31)},
        {},
        rf"{NORM} is \(31,\) in the files and \(32,\)",
    ),
    "shape of a head": ("llama", lambda t: t | {HEAD: torch.ones(95, 32)}, {}, r"is \(95, 32\)"),
    "float8": ("llama", cast(torch.float8_e4m3fn), {}, "F8_E4M3 and config.json has no quantiz"),
    "other float8": ("llama", cast(torch.float8_e5m2), {}, "stored as F8_E5M2"),
    "int8": ("llama", cast(torch.int8), {}, "is stored as I8 .*unquantised"),
    "uint8 in one layer": (
        "llama",
        lambda t: t | {Q_PROJ: t[Q_PROJ].to(torch.uint8)},
        {},
        rf"{Q_PROJ} is stored as U8",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_the_whole_model_is_refused(kind: str, tmp_path: Path) -> None:
    family, change, entries, message = REFUSED[kind]
    assert re.search(message, found := refusal(save(family, tmp_path, change, **entries))), found


LOADED: dict[str, tuple[str, Change]] = {
    "only the head of tied ones": ("llama_tied", renamed(EMBEDDING, HEAD)),
    "both of tied ones": ("llama_tied", also(lm_head__weight=lambda t: t[EMBEDDING].clone())),
    "old masks": ("gpt2", masks),
    "orphan layer": (
        "llama",
        lambda t: t | {k.replace("s.1.", "s.2."): v.clone() for k, v in t.items() if "s.1." in k},
    ),
    "biases of no layer": ("llama", also(x__bias=lambda t: torch.ones(32))),
    "odd dtype beside": ("llama", also(x=lambda t: torch.ones(2, dtype=torch.complex64))),
    "compiled": ("llama", prefixed("_orig_mod.")),
    "compiled, tied": ("llama_tied", prefixed("_orig_mod.")),
    "in parallel": ("gpt2", prefixed("module.")),
    "both": ("llama", prefixed("module._orig_mod.")),
    "compiled within": ("llama", renamed("self_attn.", "self_attn._orig_mod.")),
    "sharded and checkpointed": (
        "llama_tied",
        renamed("layers.1.", "layers.1._fsdp_wrapped_module._checkpoint_wrapped_module."),
    ),
    "attribute of a module": ("llama", prefixed("model.")),
    "part of a larger model": ("llama_tied", prefixed("language_model.")),
    "policy": ("gpt2", prefixed("actor.policy.")),
    "gemma3 wrapper": ("gemma3 wrapper", lambda t: t),
    "gemma3 wrapper, compiled": ("gemma3 wrapper", prefixed("_orig_mod.")),
}


@pytest.fixture(scope="module", autouse=True)
def own_code_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with code_cache_at(tmp_path_factory.mktemp("modules")):
        yield


def dense(folder: Path, home: Path) -> DenseModel:
    return DenseModel(folder, DigestCache(home / "digests.json"))


@pytest.mark.parametrize("kind", LOADED)
def test_stream_and_whole_model_read_the_same_and_so_does_a_user(kind: str, tmp_path: Path) -> None:
    family, change = LOADED[kind]
    healthy = dense(save(family, tmp_path / "healthy"), tmp_path)
    other = dense(save(family, tmp_path / "dense", change), tmp_path)
    expected = healthy.load().state_dict()

    whole = other.load().state_dict()
    assert set(other.layout.stored) == set(expected) == set(whole)
    for name, key in other.layout.stored.items():
        assert torch.equal(other.checkpoint.read(key), expected[name]), name
        assert torch.equal(whole[name], expected[name]), name
    assert (other.parameters, other.nbytes) == (healthy.parameters, healthy.nbytes)
    assert set(other.stored) == set(other.keys)

    layers = other.layout.layers[:3]
    factors = {
        layer.name: (torch.randn(layer.out_features, 4), torch.randn(4, layer.in_features))
        for layer in layers
    }
    small = tmp_path / "small"
    written = write_folder(small, other.checkpoint, as_layers(factors), other.layout)
    saved = sum(layer.dense_cost - 4 * layer.atom_cost for layer in layers)
    assert written.parameters == count_parameters(small).parameters == healthy.parameters - saved
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        small, trust_remote_code=True, output_loading_info=True
    )
    info, state = loaded[1], loaded[0].state_dict()
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys"))
    for name in expected:
        layer_name = name.removesuffix(".weight")
        wanted = factors[layer_name][0] if layer_name in factors else expected[name]
        assert torch.equal(state[name], wanted), name
    to_dense(small, tmp_path / "exported")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").state_dict()
    untouched = [n for n in expected if n.removesuffix(".weight") not in factors]
    assert all(torch.equal(again[name], expected[name]) for name in untouched)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_a_family_has_its_key(family: str, tmp_path: Path) -> None:
    folder = save(family, tmp_path)
    checkpoint = Checkpoint(folder)
    layout = inspect_model(checkpoint)

    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert set(layout.stored) == set(state) and not layout.unused and not layout.wrappers
    assert all(torch.equal(checkpoint.read(layout.stored[name]), state[name]) for name in state)


def test_tied_weights_that_differ_are_not_tied(tmp_path: Path) -> None:
    """transformers does not tie them either, whatever config.json says."""
    folder = save("llama_tied", tmp_path, also(lm_head__weight=lambda t: t[EMBEDDING] + 1))
    layout = inspect_model(Checkpoint(folder))

    assert (layout.stored[HEAD], layout.stored[EMBEDDING]) == (HEAD, EMBEDDING)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight + 1)


def test_what_is_no_part_of_the_model_moves_no_digest(tmp_path: Path) -> None:
    plain = dense(save("gpt2", tmp_path / "plain"), tmp_path)
    other = dense(save("gpt2", tmp_path / "masks", masks), tmp_path)

    assert other.digest == plain.digest
    assert len(other.layout.unused) == 3 and not plain.layout.unused


@pytest.mark.parametrize("named", ["a.safetensors", "a.safetensors.index.json"])
def test_the_weights_that_config_json_names_come_first(named: str, tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "dense", transformers_weights=named)
    tensors = {key: tensor + 1 for key, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "a.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "a.safetensors")}
    (folder / "a.safetensors.index.json").write_text(json.dumps(index))

    model = dense(folder, tmp_path)
    assert torch.equal(model.checkpoint.read(NORM), tensors[NORM])
    assert torch.equal(model.load().state_dict()[NORM], tensors[NORM])
    write_folder(tmp_path / "out", model.checkpoint, [], model.layout)
    out: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(out.state_dict()[NORM], tensors[NORM])


def test_a_single_file_comes_before_an_index(tmp_path: Path) -> None:
    folder = save("llama", tmp_path)
    index = {"metadata": {}, "weight_map": {NORM: "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    assert [file.name for file in Checkpoint(folder).files] == ["model.safetensors"]
