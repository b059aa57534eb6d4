"""What people do with a model works on one whose layers keep columns or share an in-factor."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import compress_core.hf  # noqa: F401  registers the format
from compress_core.folder.export import to_dense
from compress_core.forms.linear import is_compressed
from tests.pipeline.contents import varied_layers
from tests.pipeline.folders import (
    BATCH,
    Pair,
    both_ways,
    expect_same_tensors,
    expect_shared,
    load,
    logits_of,
    make_pairs,
)

CASES = ["llama", "llama_tied", "gpt2"]
OWNER = "model.layers.0.self_attn.q_proj"  # of the tiny Llama, as are the next two
SHARER = "model.layers.1.self_attn.q_proj"
KEEPER = "model.layers.1.self_attn.k_proj"


pytestmark = pytest.mark.usefixtures("code_cache")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """Dense and compressed folders of every case."""
    return make_pairs(tmp_path_factory.mktemp("varied"), CASES, varied_layers)


@pytest.fixture(scope="module")
def llama(pairs: dict[str, Pair]) -> Pair:
    return pairs["llama"]


@both_ways
def test_moves_copies_and_pickles_keep_one_factor(trust: bool, llama: Pair, tmp_path: Path) -> None:
    model = load(llama.small, trust)
    want = logits_of(model)
    twin = copy.deepcopy(model)
    assert twin.get_submodule(OWNER).factor_in is not model.get_submodule(OWNER).factor_in
    for other in (twin, pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits_of(other), want)
        expect_shared(other, llama.small)
        other.tie_weights()
        expect_shared(other.to(torch.float64), llama.small)
        other.to(torch.float32).save_pretrained(tmp_path / "saved")
        expect_same_tensors(tmp_path / "saved", llama.small)
        assert (tmp_path / "saved" / "modeling_eigenpress.py").exists()
    twin.to_empty(device="cpu").tie_weights()
    expect_shared(twin, llama.small)
    twin.load_state_dict(model.state_dict())
    expect_shared(twin, llama.small)


@both_ways
def test_a_training_step_moves_the_shared_factor_once(
    trust: bool, llama: Pair, tmp_path: Path
) -> None:
    model = load(llama.small, trust).train()
    parameters = list(model.parameters())
    assert len({id(parameter) for parameter in parameters}) == len(parameters)
    optimiser = torch.optim.SGD(parameters, lr=0.1)
    before = model.get_submodule(OWNER).factor_in.detach().clone()
    model(BATCH, labels=BATCH).loss.backward()
    gradient = model.get_submodule(SHARER).factor_in.grad
    assert model.get_submodule(KEEPER).columns.grad.abs().sum() > 0
    optimiser.step()
    assert torch.allclose(model.get_submodule(SHARER).factor_in, before - 0.1 * gradient)
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(logits_of(load(tmp_path)), logits_of(model))


@both_ways
def test_whole_model_compiles_without_a_graph_break(trust: bool, llama: Pair) -> None:
    model = load(llama.small, trust)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(BATCH, use_cache=False).logits, logits_of(model), atol=1e-6)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")
@both_ways
def test_lora_on_layers_with_columns_and_shared_factors(trust: bool, llama: Pair) -> None:
    model = load(llama.small, trust)
    before = logits_of(model)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"])
    tuned: Any = get_peft_model(model, config)
    assert torch.equal(logits_of(tuned), before)
    tuned(BATCH, labels=BATCH).loss.backward()
    tuned.get_base_model().tie_weights()
    assert torch.equal(logits_of(tuned), before)


@both_ways
@pytest.mark.parametrize("case", ["llama", "llama_tied", "gpt2"])
def test_dense_again(case: str, trust: bool, pairs: dict[str, Pair], tmp_path: Path) -> None:
    pair = pairs[case]
    want = logits_of(pair.reference)
    model = load(pair.small, trust)
    model.save_pretrained(tmp_path / "first")
    dense = model.dequantize()
    dense.tie_weights()
    dense.save_pretrained(tmp_path / "dense")
    to_dense(pair.small, tmp_path / "exported", max_shard_bytes=6000)
    for folder in (tmp_path / "dense", tmp_path / "exported"):
        loaded, found = load(folder, output_loading_info=True)
        assert not any(is_compressed(module) for module in loaded.modules())
        assert not found["missing_keys"] and not found["unexpected_keys"]
        assert torch.allclose(logits_of(loaded), want, atol=1e-5)
    assert torch.allclose(logits_of(dense), want, atol=1e-5)
