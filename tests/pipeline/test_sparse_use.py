"""What people do with a model works on one whose layers have sparse entries and new biases."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import compress_core.hf  # noqa: F401  registers the format
from compress_core.errors import ModelError
from compress_core.folder.export import to_dense
from compress_core.forms.linear import is_compressed
from compress_core.sparse import PLACES
from tests.pipeline.contents import sparse_layers
from tests.pipeline.folders import (
    BATCH,
    Pair,
    both_ways,
    expect_same_tensors,
    load,
    logits_of,
    make_pairs,
)

CASES = ["llama", "llama_bias", "gpt2"]
BESIDE = "model.layers.0.self_attn.k_proj"  # of the tiny Llama: entries beside factors, a new bias


pytestmark = pytest.mark.usefixtures("code_cache")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """Dense and compressed folders of every case."""
    return make_pairs(tmp_path_factory.mktemp("sparse"), CASES, sparse_layers)


@pytest.fixture(scope="module")
def llama(pairs: dict[str, Pair]) -> Pair:
    return pairs["llama"]


@both_ways
@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_moves_copies_and_pickles(
    case: str, trust: bool, pairs: dict[str, Pair], tmp_path: Path
) -> None:
    model = load(pairs[case].small, trust)
    want = logits_of(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits_of(other), want)
        assert torch.allclose(logits_of(other.to(torch.float64)).float(), want, atol=1e-5)
        other.to(torch.float32).save_pretrained(tmp_path / "saved")
        expect_same_tensors(tmp_path / "saved", pairs[case].small)
    twin = copy.deepcopy(model).to_empty(device="cpu")
    twin.tie_weights()
    twin.load_state_dict(model.state_dict())
    for name, buffer in model.named_buffers():  # what no state holds is lost by to_empty
        twin.get_buffer(name).copy_(buffer)
    assert torch.equal(logits_of(twin), want)


@both_ways
def test_generating_is_the_same(trust: bool, llama: Pair) -> None:
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    found = load(llama.small, trust).generate(BATCH, **options)
    assert torch.equal(found, llama.reference.generate(BATCH, **options))


@both_ways
def test_whole_model_compiles_without_a_graph_break(trust: bool, llama: Pair) -> None:
    model = load(llama.small, trust)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(BATCH, use_cache=False).logits, logits_of(model), atol=1e-5)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")
@both_ways
def test_lora(trust: bool, llama: Pair) -> None:
    model = load(llama.small, trust)
    before = logits_of(model)
    config = LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"])
    tuned: Any = get_peft_model(model, config)
    assert torch.equal(logits_of(tuned), before)
    tuned(BATCH, labels=BATCH).loss.backward()
    assert any(p.grad is not None for p in tuned.parameters())
    with pytest.raises(RuntimeError, match="must match the size"):
        tuned.merge_and_unload()


@both_ways
def test_the_trainer_trains_entries_and_biases(trust: bool, llama: Pair, tmp_path: Path) -> None:
    model = load(llama.small, trust)
    first = {key: value.clone() for key, value in model.state_dict().items()}
    rows = [{"input_ids": row, "labels": row} for row in BATCH]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    model.eval()
    last = model.state_dict()
    for key in first:
        moves = key.rpartition(".")[2] not in PLACES and first[key].numel() > 0
        assert torch.equal(first[key], last[key]) != moves, key
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(load(tmp_path / "saved", not trust)), logits_of(model))


@both_ways
@pytest.mark.parametrize("case", ["llama_bias", "gpt2"])
def test_dense_again(case: str, trust: bool, pairs: dict[str, Pair], tmp_path: Path) -> None:
    """Where the architecture has the biases that were added to."""
    pair = pairs[case]
    want = logits_of(pair.reference)
    dense = load(pair.small, trust).dequantize()
    dense.save_pretrained(tmp_path / "dense")
    to_dense(pair.small, tmp_path / "exported", max_shard_bytes=6000)
    for folder in (tmp_path / "dense", tmp_path / "exported"):
        loaded, found = load(folder, output_loading_info=True)
        assert not any(is_compressed(module) for module in loaded.modules())
        assert not found["missing_keys"] and not found["unexpected_keys"]
        assert torch.allclose(logits_of(loaded), want, atol=1e-5)


@both_ways
def test_a_new_bias_stays_in_memory_and_out_of_an_ordinary_checkpoint(
    trust: bool, llama: Pair, tmp_path: Path
) -> None:
    dense = load(llama.small, trust).dequantize()
    assert not any(is_compressed(module) for module in dense.modules())
    assert dense.get_submodule(BESIDE).bias is not None
    assert torch.allclose(logits_of(dense), logits_of(llama.reference), atol=1e-5)
    with pytest.raises(ModelError, match="got a bias from its method, which LlamaForCausalLM has"):
        to_dense(llama.small, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
