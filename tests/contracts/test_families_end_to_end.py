"""Every family goes from a folder and a text to a smaller folder that does what was promised."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from compress_core.forms.linear import is_compressed
from compress_core.hf.checkpoint import Checkpoint
from compress_core.hf.layout import inspect_model
from compress_core.hf.loading import load_model
from compress_core.types import LayerRef, Share
from storage.artifact import Artifact
from tasks.engine.dense_model import FOLDER
from tasks.stages.allocate import read_shares
from tasks.stages.arrays import get_tensor
from tests.code_cache import code_cache_at
from tests.contracts.more_families import MORE, any_model
from tests.families import FAMILIES, VOCABULARY, token_batch
from tests.pipeline import pico

CASES = [*FAMILIES, *MORE]
TOKENS = token_batch(rows=2, length=20)


@dataclass
class Case:
    """A family's dense folder, and its folder at two budgets."""

    family: str
    dense: Path
    settings: dict[str, Any]
    small: pico.Walk  # kept 0.6, in plain factors
    whole: pico.Walk  # kept 1

    @cached_property
    def pivot(self) -> pico.Walk:  # kept 0.6, as by default
        return pico.walk({**self.settings, "kept": 0.6})

    def folder(self, walk: pico.Walk) -> Path:
        return walk.session.artifact(walk.pipeline.folder).file(FOLDER)

    @cached_property
    def layers(self) -> tuple[LayerRef, ...]:
        return inspect_model(Checkpoint(self.dense)).layers

    @property
    def shares(self) -> dict[str, Share]:
        return read_shares(self.small.session.artifact(pico.allocation_of(self.small.pipeline)))

    def artifact(self, stage: str, unit: str) -> Artifact:
        session = self.small.session
        found = [u for u in session.manifests if (u.stage, u.name) == (stage, unit)]
        return session.artifact(found[0])


Get = Callable[[str], Case]


@pytest.fixture(scope="module", autouse=True)
def own_code_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with code_cache_at(tmp_path_factory.mktemp("modules")):
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text(pico.made_text(seed=1, words=2000), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def tokenizer(text: Path) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special)
    tokenizer.train([str(text)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="module")
def case(
    text: Path, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Get:
    """A family, compressed once for all tests."""
    made: dict[str, Case] = {}

    def get(family: str) -> Case:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            dense = folder / "dense"
            any_model(family).save_pretrained(dense)
            tokenizer.save_pretrained(dense)
            settings = {
                "model": str(dense),
                "method": "svd_llm",
                "calibration": str(text),
                "samples": 6,
                "length": 32,
                "batch_size": 4,
                "eval_windows": 2,
                "device": "cpu",
                "home": folder / "home",
            }
            small = pico.walk({**settings, "factors": "plain", "kept": 0.6})
            whole = pico.walk({**settings, "factors": "plain", "kept": 1})
            made[family] = Case(family, dense, settings, small, whole)
        return made[family]

    return get


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(TOKENS).logits
    return found


@pytest.mark.parametrize(
    ("family", "form"),
    [(name, "small") for name in CASES] + [(name, "pivot") for name in ("llama", "gpt2", "mamba")],
)
def test_the_folder_loads_both_ways_with_the_same_logits(family: str, form: str, case: Get) -> None:
    folder = case(family).folder(getattr(case(family), form))

    stock = load_model(folder)
    by_own_code = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", trust_remote_code=True
    ).eval()
    found = logits(stock)
    assert torch.isfinite(found).all()
    assert torch.equal(found, logits(by_own_code))
    assert type(stock).__module__.startswith("transformers.models.")
    assert type(by_own_code).__module__.startswith("transformers_modules.")
    for layer in case(family).layers:
        assert is_compressed(stock.get_submodule(layer.name))


@pytest.mark.parametrize("family", CASES)
def test_parameters_are_as_allocated(family: str, case: Get) -> None:
    one = case(family)
    before = load_file(one.dense / "model.safetensors")
    after = load_file(one.folder(one.small) / "model.safetensors")

    freed = sum(layer.dense_cost - one.shares[layer.name].cost(layer) for layer in one.layers)
    count = sum(tensor.numel() for tensor in after.values())
    assert count == sum(tensor.numel() for tensor in before.values()) - freed
    attrs = one.small.session.artifact(one.small.pipeline.folder).attrs
    assert attrs["parameters"] == count
    dense = sum(layer.dense_cost for layer in one.layers)
    cost = sum(one.shares[layer.name].cost(layer) for layer in one.layers)
    spare = sum(layer.atom_cost for layer in one.layers)
    assert 0.6 * dense - spare < cost <= 0.6 * dense


@pytest.mark.parametrize("family", CASES)
def test_all_but_the_weights_of_layers_is_kept(family: str, case: Get) -> None:
    one = case(family)
    before = load_file(one.dense / "model.safetensors")
    after = load_file(one.folder(one.small) / "model.safetensors")

    replaced = {key for key in before if any(f".{key}".endswith(_end(x)) for x in one.layers)}
    assert len(replaced) == len(one.layers)
    kept = set(before) - replaced
    assert kept <= set(after)
    assert all(torch.equal(before[key], after[key]) for key in kept)
    new = set(after) - set(before)
    assert new == {key.removesuffix("weight") + "factor_in" for key in replaced}


def _end(layer: LayerRef) -> str:
    return f"{layer.name.partition('.')[2]}.weight"


@pytest.mark.parametrize("family", CASES)
def test_measured_error_is_the_predicted_loss(family: str, case: Get) -> None:
    one = case(family)
    model = load_model(one.dense)
    tensors = load_file(one.folder(one.small) / "model.safetensors")
    dense = load_file(one.dense / "model.safetensors")
    inputs = watch_inputs(model, one)

    for layer in one.layers:
        rank = one.shares[layer.name].rank
        assert rank is not None
        loss = get_tensor(one.artifact("decompose", layer.name), "loss")
        name = next(k for k in tensors if f".{k}".endswith(_end(layer)))
        u, v = tensors[name], tensors[name.removesuffix("weight") + "factor_in"]
        assert u.shape == (layer.out_features, rank) and v.shape == (rank, layer.in_features)
        gap = weight_of(dense, layer).double() - u.double() @ v.double()
        measured = (inputs[layer.name] @ gap.T).square().sum(dim=1).mean()
        torch.testing.assert_close(measured, loss[rank], rtol=1e-4, atol=1e-9 * float(loss[0]))


def weight_of(tensors: dict[str, Tensor], layer: LayerRef) -> Tensor:
    stored = tensors[next(k for k in tensors if f".{k}".endswith(_end(layer)))]
    return stored.T if layer.transposed else stored


def watch_inputs(model: Any, one: Case) -> dict[str, Tensor]:
    """Every layer's input (tokens, in) on the calibration windows, from the whole dense model."""
    seen: dict[str, list[Tensor]] = {layer.name: [] for layer in one.layers}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, args: Any) -> None:
            seen[name].append(args[0].reshape(-1, args[0].shape[-1]).double())

        return hook

    for name in seen:
        model.get_submodule(name).register_forward_pre_hook(keep(name))
    with torch.no_grad():
        model(get_tensor(one.artifact("tokenise", "calibration"), "tokens"))
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("family", CASES)
def test_all_of_it_is_the_same_model(family: str, case: Get) -> None:
    one = case(family)
    expected = logits(load_model(one.dense))

    assert torch.equal(logits(load_model(one.folder(one.whole))), expected)
    assert one.whole.computed.keys() <= {"allocate", "realise", "materialise", "evaluate"}
    assert one.whole.metrics()["kl"] == 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "phi"])
def test_bf16_models_stay_in_bf16(
    family: str, text: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, case: Get
) -> None:
    dense = tmp_path / "dense"
    any_model(family, torch.bfloat16).save_pretrained(dense)
    tokenizer.save_pretrained(dense)
    settings = case(family).settings | {"model": str(dense), "home": tmp_path / "home"}

    walk = pico.walk({**settings, "kept": 0.6})
    folder = walk.session.artifact(walk.pipeline.folder).file(FOLDER)
    stored = load_file(folder / "model.safetensors")
    bits = {name for name in stored if name.endswith(".pivot_rows")}
    assert bits and {stored[name].dtype for name in stored.keys() - bits} == {torch.bfloat16}
    found = logits(load_model(folder))
    assert found.dtype is torch.bfloat16 and torch.isfinite(found).all()
