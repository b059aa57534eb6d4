"""A hundred damaged model folders: refused in one line, or what transformers makes of them."""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from compress_core.errors import CompressError
from storage.errors import StorageError
from tasks.stages.arrays import get_tensor
from tests.damage import nonsense
from tests.pipeline import pico
from tests.whole import perplexity_and_kl

TRIES, SEED = 100, 11
PREFIXES = {r"^(?:module|_orig_mod)\.": ""}  # which are understood, and a note says so
Tensors = dict[str, Tensor]


def lose_tensor(tensors: Tensors, name: str, chance: random.Random) -> None:
    del tensors[name]


def rename_tensor(tensors: Tensors, name: str, chance: random.Random) -> None:
    tensors[chance.choice(["module.", "_orig_mod.", "x."]) + name] = tensors.pop(name)


def shorten_tensor(tensors: Tensors, name: str, chance: random.Random) -> None:
    tensors[name] = tensors[name][:-1].clone()


def lengthen_tensor(tensors: Tensors, name: str, chance: random.Random) -> None:
    tensors[name] = torch.cat([tensors[name], tensors[name][:1]])


def turn_tensor(tensors: Tensors, name: str, chance: random.Random) -> None:
    tensors[name] = tensors[name].T.contiguous()


def cast_tensor(tensors: Tensors, name: str, chance: random.Random) -> None:
    kinds = [torch.float64, torch.float16, torch.int8, torch.float8_e4m3fn, torch.bool]
    tensors[name] = tensors[name].to(chance.choice(kinds))


def spoil_tensor(tensors: Tensors, name: str, chance: random.Random) -> None:
    tensors[name].view(-1)[0] = chance.choice([float("nan"), float("inf"), 1e38])


def empty_tensor(tensors: Tensors, name: str, chance: random.Random) -> None:
    tensors[name] = torch.zeros(0)


def add_tensor(tensors: Tensors, name: str, chance: random.Random) -> None:
    tensors[chance.choice(["lm_head.weight", "model.layers.9.mlp.up_proj.weight", "other"])] = (
        tensors[name].clone()
    )


def prefix_all(tensors: Tensors, name: str, chance: random.Random) -> None:
    prefix = chance.choice(["module.", "_orig_mod.", "model.", "language_model."])
    for old in list(tensors):
        tensors[prefix + old] = tensors.pop(old)


def strip_all(tensors: Tensors, name: str, chance: random.Random) -> None:
    for old in list(tensors):
        tensors[old.partition(".")[2]] = tensors.pop(old)


TENSOR_HARMS = (
    *(lose_tensor, rename_tensor, shorten_tensor, lengthen_tensor, turn_tensor, cast_tensor),
    *(spoil_tensor, empty_tensor, add_tensor, prefix_all, strip_all),
)


def harm_tensors(model: Path, chance: random.Random) -> str:
    file = model / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    name, change = chance.choice(sorted(tensors)), chance.choice(TENSOR_HARMS)
    change(tensors, name, chance)
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})
    return f"{change.__name__} {name}"


def harm_json(model: Path, chance: random.Random) -> str:
    names = ["config.json"] * 4 + ["tokenizer_config.json", "tokenizer.json"]
    return nonsense.mutate_json(model / chance.choice(names), chance)


def add_file(model: Path, chance: random.Random) -> str:
    name = chance.choice(
        ["adapter_config.json", "pytorch_model.bin", "model.safetensors.index.json", "vocab.json"]
    )
    content = chance.choice(["", "{}", "[]", '{"weight_map": {"a": "../a.safetensors"}}', "x"])
    (model / name).write_text(content)
    return f"added {name}: {content!r}"


KINDS: tuple[Callable[[Path, random.Random], str], ...] = (
    *(harm_tensors, harm_tensors, harm_json, harm_json, nonsense.harm, add_file),
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> list[pico.Inputs]:
    """Folders before the damage: tied and untied, transposed weights, in shards."""
    folder = tmp_path_factory.mktemp("sound")
    made = [pico.make_inputs(folder / "llama", config=partial(pico.llama, blocks=1))]
    made += [pico.make_inputs(folder / "gpt2", config=partial(pico.gpt2, blocks=1))]

    def untied(vocabulary: int) -> Any:
        config = pico.llama(vocabulary, blocks=1)
        config.tie_word_embeddings = False
        return config

    made += [pico.make_inputs(folder / "untied", config=untied)]
    return made


def reference(model: Path, tokens: Tensor) -> float | None:
    """The perplexity of what transformers loads; None where it loads nothing whole."""
    try:
        found: Any = AutoModelForCausalLM.from_pretrained(
            model,
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
            key_mapping=PREFIXES,
        )
    except Exception:
        return None
    loaded, info = found
    if info["missing_keys"] or info["mismatched_keys"] or info.get("error_msgs"):
        return None
    return perplexity_and_kl(loaded, tokens).perplexity


@pytest.mark.parametrize("number", range(TRIES))
def test_a_damaged_folder(number: int, sound: list[pico.Inputs], tmp_path: Path) -> None:
    chance = random.Random(SEED * 1000 + number)
    inputs = pico.copy_inputs(chance.choice(sound), tmp_path)
    done = chance.choice(KINDS)(inputs.model, chance)
    settings = inputs.settings(
        tmp_path / "home", samples=2, length=32, eval_windows=2, compute="float32"
    )
    try:
        walk = pico.walk(settings)
    except (CompressError, StorageError) as refusal:
        assert str(refusal).strip(), done
        return
    tokens = walk_tokens(walk)
    dense = next(e for e in walk.pipeline.evaluations if e.model == "dense")
    measured = walk.session.artifact(dense.unit).attrs["perplexity"]
    assert measured == pytest.approx(reference(inputs.model, tokens), rel=1e-4), done
    again = reference(walk.folder, tokens)
    assert walk.metrics()["perplexity"] == pytest.approx(again, rel=1e-4), done


def walk_tokens(walk: pico.Walk) -> Tensor:
    """The evaluation windows of a walk."""
    unit = [group.units[0] for group in walk.pipeline.groups if group.stage == "tokenise"][-1]
    return get_tensor(walk.session.artifact(unit), "tokens")
