"""What people do with a model works on a compressed one: generate, compile, tune, cast, save."""

import copy
import importlib
import re
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline

import compress_core.folder.load
import compress_core.hf
from compress_core.folder.swap import swap_layers
from compress_core.forms.linear import CompressedLinear, is_compressed
from tests.families import VOCABULARY, tiny_model
from tests.pipeline.folders import BATCH, Pair, logits_of, make_pair, random_factors, write_small

UP, GATE, DOWN = (f"model.layers.0.mlp.{part}_proj" for part in ("up", "gate", "down"))

peft_uses_an_old_name = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")

pytestmark = pytest.mark.usefixtures("code_cache")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A tiny Llama with a word tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder / "dense")
    return make_pair(tiny_model("llama"), folder)


@pytest.fixture(params=[False, True], ids=["stock", "remote"])
def model(request: pytest.FixtureRequest, llama: Pair) -> Any:
    """The compressed Llama, loaded as the stock class and by the folder's own code."""
    return AutoModelForCausalLM.from_pretrained(llama.small, trust_remote_code=request.param)


def test_generate_equals_the_model_in_memory(model: Any, llama: Pair) -> None:
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(BATCH, **options), llama.reference.generate(BATCH, **options))


@pytest.mark.parametrize("trust", [False, True], ids=["stock", "remote"])
def test_text_generation_pipeline(trust: bool, llama: Pair) -> None:
    generate = pipeline("text-generation", model=str(llama.small), trust_remote_code=trust)
    (answer,) = generate("w5 w6 w7", max_new_tokens=4, do_sample=False, return_tensors=True)
    ids = torch.tensor([[5, 6, 7]])
    want = llama.reference.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert answer["generated_token_ids"] == want[0].tolist()


def test_whole_model_compiles_without_a_graph_break(model: Any) -> None:
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(BATCH, use_cache=False).logits, logits_of(model), atol=1e-6)


def test_layer_compiles_and_exports() -> None:
    layer = CompressedLinear(8, 6, {"rank": 2})
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    x = torch.randn(3, 8)
    exported = torch.export.export(layer, (x,))
    assert torch.allclose(exported.module()(x), layer(x))
    dense = nn.functional.linear(x, layer.dense_weight(), layer.bias)
    assert torch.allclose(layer(x), dense, atol=1e-5)


def _train_lora(model: Any) -> tuple[Any, list[float]]:
    torch.manual_seed(0)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    optimiser = torch.optim.AdamW((p for p in tuned.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = tuned(BATCH, labels=BATCH).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return tuned, losses


@peft_uses_an_old_name
def test_lora_trains_and_refuses_to_merge(model: Any, llama: Pair, tmp_path: Path) -> None:
    tuned, losses = _train_lora(model)
    assert losses[-1] < losses[0] - 0.1
    tuned.eval()
    tuned.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(llama.small)
    kept = PeftModel.from_pretrained(fresh, str(tmp_path / "adapter"))
    assert torch.equal(logits_of(kept), logits_of(tuned))
    with tuned.disable_adapter():
        assert torch.equal(logits_of(tuned), logits_of(llama.reference))
    before = logits_of(tuned)
    for safe in (False, True):
        with pytest.raises(RuntimeError, match="must match the size"):
            copy.deepcopy(tuned).merge_and_unload(safe_merge=safe)
    with pytest.raises(RuntimeError, match="must match the size"):
        tuned.merge_adapter()
    assert torch.equal(logits_of(tuned), before)


@peft_uses_an_old_name
def test_lora_merges_after_dequantize(model: Any, llama: Pair) -> None:
    dense = model.dequantize()
    assert not any(is_compressed(module) for module in dense.modules())
    tuned, _ = _train_lora(dense)
    tuned.eval()
    before = logits_of(tuned)
    assert torch.allclose(logits_of(tuned.merge_and_unload()), before, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dequantize_saves_an_ordinary_checkpoint(family: str, tmp_path: Path) -> None:
    pair = make_pair(tiny_model(family), tmp_path)
    AutoModelForCausalLM.from_pretrained(pair.small).dequantize().save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out" / "modeling_eigenpress.py").exists()
    loaded, found = cast(
        Any, AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    )
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert not hasattr(loaded.config, "quantization_config")
    assert torch.allclose(logits_of(loaded), logits_of(pair.reference), atol=1e-5, rtol=0)


def test_factors_themselves_can_be_trained(model: Any) -> None:
    model.train()
    model(BATCH, labels=BATCH).loss.backward()
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert layer.weight.grad.abs().sum() > 0 and layer.factor_in.grad.abs().sum() > 0


@pytest.mark.parametrize("trust", [False, True], ids=["stock", "remote"])
def test_stored_bfloat16_round_trip_is_exact(trust: bool, tmp_path: Path) -> None:
    dense: Any = tiny_model("llama", dtype=torch.bfloat16)
    dense.save_pretrained(tmp_path / "dense")
    factors = random_factors(dense)
    write_small(tmp_path / "dense", tmp_path / "small", factors)
    first: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=trust)
    assert first.dtype == torch.bfloat16
    for name, (u, v) in factors.items():
        assert torch.equal(first.get_submodule(name).weight, u)
        assert torch.equal(first.get_submodule(name).factor_in, v)
    first.save_pretrained(tmp_path / "again")
    for again_trust in (False, True):
        again = AutoModelForCausalLM.from_pretrained(
            tmp_path / "again", trust_remote_code=again_trust
        )
        assert again.dtype == torch.bfloat16
        assert torch.equal(logits_of(again), logits_of(first))


def test_loading_in_bfloat16_rounds_every_weight_once(llama: Pair) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(llama.small, dtype=torch.bfloat16)
    want: dict[str, Any] = dict(llama.reference.named_parameters())
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, want[name].to(torch.bfloat16))
    assert logits_of(loaded).isfinite().all()


def test_copies_save_themselves_and_not_the_original(llama: Pair, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(llama.small)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.get_submodule("model.layers.0.mlp.down_proj").weight.zero_()
    twin.save_pretrained(tmp_path / "twin")
    assert (tmp_path / "twin" / "modeling_eigenpress.py").read_bytes() == (
        llama.small / "modeling_eigenpress.py"
    ).read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "twin", trust_remote_code=True)
    assert torch.equal(logits_of(loaded), logits_of(twin))
    assert not torch.equal(logits_of(loaded), logits_of(model))


def test_importing_twice_registers_once() -> None:
    module = compress_core.folder.load
    first = dict(vars(module))
    importlib.reload(module)
    importlib.reload(compress_core.hf)
    vars(module).update(first)  # what is registered can be pickled only under its own name


@pytest.mark.parametrize(
    ("modules", "version", "message"),
    [
        ({"model.layers.9.mlp.up_proj": {"rank": 2}}, 1, "no layer"),
        ({"model.norm": {"rank": 2}}, 1, "not a linear layer"),
        ({"model.layers.0.mlp.up_proj": {"rank": -1}}, 1, "cannot store"),
        ({"model.layers.0.mlp.up_proj": {"rank": 20}}, 1, "cannot have rank 20"),
        ({"model.layers.0.mlp.up_proj": {"rank": 2}}, 5, "format 5"),
        ({UP: {"rank": 2, "columns": 32}}, 2, "cannot store"),
        ({UP: {"rank": 18, "columns": 8}}, 2, "cannot have rank 18 and 8 columns"),
        ({UP: {"rank": 2, "factor_in": GATE}}, 2, "not in the list"),
        ({UP: {"rank": 2, "factor_in": UP}}, 2, "has none of its own"),
        ({UP: {"rank": 2, "factor_in": GATE}, GATE: {"rank": 3}}, 2, r"is \(3, 32\), not"),
        ({UP: {"rank": 2, "factor_in": DOWN}, DOWN: {"rank": 2}}, 2, r"is \(2, 48\), not"),
        ({UP: {"rank": 2, "factor_in": GATE}, GATE: {"rank": 2, "columns": 1}}, 2, "shares no"),
        ({UP: {"rank": 24, "factor_in": GATE}, GATE: {"rank": 24}}, 2, "cannot have rank 24"),
        ({UP: {"rank": 2, "nonzeros": 1376}}, 3, "cannot have rank 2 and 1376 entries"),
        ({UP: {"rank": 0, "nonzeros": 1488, "bias": True}}, 3, "cannot have rank 0 and 1488"),
        ({UP: {"rank": 2, "nonzeros": 1290, "columns": 2}}, 4, "2 and 2 columns and 1290 entries"),
        ({UP: {"rank": 2, "factor_in": GATE, "nonzeros": 9}, GATE: {"rank": 2}}, 3, "shares no"),
    ],
)
def test_swapping_refuses(modules: dict[str, Any], version: int, message: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=message):
        swap_layers(model, modules, format_version=version)
    assert not any(is_compressed(module) for module in model.modules())


@pytest.mark.parametrize(
    ("entry", "other"),
    [
        ({"rank": 3}, {"rank": 4}),
        ({"rank": 3, "columns": 1}, {"rank": 3}),
        ({"rank": 3, "factor_in": GATE}, {"rank": 3}),
        ({"rank": 3, "nonzeros": 9}, {"rank": 3}),
        ({"rank": 3, "nonzeros": 9, "bias": True}, {"rank": 3, "nonzeros": 9}),
    ],
)
def test_swapping_twice_changes_nothing_and_another_entry_is_refused(
    entry: dict[str, Any], other: dict[str, Any]
) -> None:
    model = tiny_model("llama")
    modules = {GATE: {"rank": 3}, UP: entry}
    swap_layers(model, modules)
    layers = [module for module in model.modules() if is_compressed(module)]
    swap_layers(model, modules)
    assert [module for module in model.modules() if is_compressed(module)] == layers
    with pytest.raises(ValueError, match=re.escape(f"has {entry} already, not {other}")):
        swap_layers(model, {GATE: {"rank": 3}, UP: other})


def test_unfilled_factors_give_not_a_number() -> None:
    model = swap_layers(tiny_model("llama"), {"model.layers.0.mlp.up_proj": {"rank": 3}})
    assert logits_of(model).isnan().all()
