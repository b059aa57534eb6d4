"""What `inspect_model` finds in every family: blocks, layers, shapes, taps; and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from compress_core.errors import ModelError
from compress_core.hf.checkpoint import Checkpoint
from compress_core.hf.layout import inspect_model
from compress_core.types import ModelLayout
from tests.contracts.more_families import gemma4
from tests.families import FAMILIES, linear_names, tiny_model

SPLIT = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
TAPS = {  # layers of a block by the input that they share, in the order of the forward
    **dict.fromkeys(FAMILIES, SPLIT),
    "gpt2": [["c_attn"], ["attn.c_proj"], ["c_fc"], ["mlp.c_proj"]],
    "gpt_neox": [["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]],
    "opt": [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]],
    "phi": [["q_proj", "k_proj", "v_proj", "fc1"], ["dense"], ["fc2"]],
    "phi3": [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]],
}
BLOCKS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers", "opt": "model.decoder.layers"}

Save = Callable[[str], tuple[Any, Path]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Save:
    """A family's model and the folder that it was saved to."""
    made: dict[str, tuple[Any, Path]] = {}

    def save(family: str) -> tuple[Any, Path]:
        if family not in made:
            model, folder = tiny_model(family), tmp_path_factory.mktemp(family)
            model.save_pretrained(folder)
            made[family] = model, folder
        return made[family]

    return save


def look(saved: Save, family: str) -> tuple[Any, ModelLayout]:
    model, folder = saved(family)
    return model, inspect_model(Checkpoint(folder))


def write_config(folder: Path, config: Any, **entries: Any) -> Path:
    """A folder with a configuration and weights of nothing."""
    from safetensors.torch import save_file

    config.save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))
    save_file({"nothing": torch.zeros(1)}, folder / "model.safetensors")
    return folder


def write_model(folder: Path, config: Any) -> Path:
    """A folder with a configuration and all weights of its model."""
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_of_every_block_is_found_once(saved: Save, family: str) -> None:
    model, layout = look(saved, family)

    container = BLOCKS.get(family, "model.layers")
    assert layout.blocks == (f"{container}.0", f"{container}.1")
    assert sorted(layer.name for layer in layout.layers) == sorted(linear_names(model))
    for layer in layout.layers:
        module = model.get_submodule(layer.name)
        assert layer.name.startswith(layout.blocks[layer.block] + ".")
        assert layer.transposed == (family == "gpt2")
        features = torch.zeros(layer.in_features)
        assert module(features).shape == (layer.out_features,)
    assert layout.architecture == type(model).__name__
    assert layout.base_class == type(model.base_model).__name__


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_read_the_same_input_share_a_tap(saved: Save, family: str) -> None:
    _, layout = look(saved, family)

    for block, path in enumerate(layout.blocks):
        taps = layout.taps(block)
        found = [[layer.name for layer in layers] for layers in taps.values()]
        assert len(found) == len(TAPS[family])
        for names, expected in zip(found, TAPS[family], strict=True):
            assert all(name.startswith(path + ".") for name in names)
            assert [name.endswith(f".{end}") for name, end in zip(names, expected, strict=True)]
        assert list(taps) == [names[0] for names in found]


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_inside_a_block_or_outside(saved: Save, family: str) -> None:
    model, layout = look(saved, family)

    prefix = layout.base_prefix
    everything = {f"{prefix}.{name}" for name, _ in model.base_model.named_parameters()}
    parts = [*layout.block_parameters, layout.outer_parameters]
    assert sum(map(len, parts)) == len(everything)
    assert {name for part in parts for name in part} == everything
    for path, names in zip(layout.blocks, layout.block_parameters, strict=True):
        assert names and all(name.startswith(path + ".") for name in names)
    inputs = model.get_input_embeddings().weight
    name = next(n for n, p in model.named_parameters() if p is inputs)
    assert name in layout.outer_parameters


def test_no_weight_is_read(saved: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = saved("llama")
    checkpoint = Checkpoint(folder)
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a weight was read"))

    inspect_model(checkpoint)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("stated", [True, False])
def test_dtype_is_the_one_that_transformers_computes_in(
    tmp_path: Path, dtype: torch.dtype, stated: bool
) -> None:
    tiny_model("llama", dtype=dtype).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    if not stated:
        config.pop("dtype")
        file.write_text(json.dumps(config))

    layout = inspect_model(Checkpoint(tmp_path))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype is dtype
    assert layout.dtype == str(dtype).removeprefix("torch.")


def test_dtype_ignores_a_stored_mask(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model: Any = tiny_model("gpt2", dtype=torch.float16)
    model.base_model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["h.0.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.uint8).tril()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config.pop("dtype")
    file.write_text(json.dumps({**config, "architectures": ["GPT2LMHeadModel"]}))

    assert inspect_model(Checkpoint(tmp_path)).dtype == "float16"


def test_a_linear_that_no_text_reaches_is_left_alone(tmp_path: Path) -> None:
    config = transformers.BartConfig(
        vocab_size=96,
        d_model=32,
        decoder_layers=2,
        decoder_ffn_dim=48,
        decoder_attention_heads=4,
        max_position_embeddings=64,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)

    names = {layer.name for layer in inspect_model(Checkpoint(tmp_path)).layers}
    unread = set(linear_names(model)) - names
    assert len(names) == 12
    assert unread and all("encoder_attn" in name for name in unread)


def test_convolutions_in_a_block_stay_as_they_are(tmp_path: Path) -> None:
    config = transformers.MambaConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)

    layout = inspect_model(Checkpoint(tmp_path))
    ends = {layer.name.rpartition(".")[2] for layer in layout.of_block(0)}
    assert ends == {"in_proj", "x_proj", "out_proj"}  # dt_proj's weight is used without its module
    assert any("conv1d" in name for name in layout.block_parameters[0])


def tiny_moe(name: str) -> Any:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96}
    if name == "mixtral":
        return transformers.MixtralConfig(**sizes, **heads, num_local_experts=4)
    if name == "dbrx":
        parts: dict[str, Any] = {
            "attn_config": {"rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 48},
        }
        return transformers.DbrxConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=96, **parts)
    assert name == "qwen3_moe"
    return transformers.Qwen3MoeConfig(**sizes, **heads, num_experts=4, moe_intermediate_size=16)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "dbrx"])
def test_mixtures_of_experts_are_refused_with_the_reason(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a weight was read"))
    folder = write_config(tmp_path, tiny_moe(name))

    with pytest.raises(ModelError, match=rf"{name} is a mixture of experts \(\w+=4\): .*experts"):
        inspect_model(Checkpoint(folder))


def test_experts_that_only_the_configuration_counts_are_none(tmp_path: Path) -> None:
    config = FAMILIES["llama"]()
    config.num_experts = 4

    assert len(inspect_model(Checkpoint(write_model(tmp_path, config))).layers) == 14


def test_blocks_with_fused_weights_are_refused(tmp_path: Path) -> None:
    config = transformers.XLNetConfig(vocab_size=96, d_model=32, n_layer=2, n_head=4, d_inner=48)
    folder = write_config(tmp_path, config)

    with pytest.raises(ModelError, match=r"layer\.0\.rel_attn\.q has 3 dimensions \(32, 4, 8\)"):
        inspect_model(Checkpoint(folder))


def test_a_quantised_model_is_refused(tmp_path: Path) -> None:
    settings = {"quant_method": "gptq", "bits": 4}
    folder = write_config(tmp_path, FAMILIES["llama"](), quantization_config=settings)

    with pytest.raises(ModelError, match="is quantised with gptq: start from the unquantised"):
        inspect_model(Checkpoint(folder))


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    folder = write_config(tmp_path, transformers.T5Config(d_model=32, num_layers=1, d_ff=32))

    with pytest.raises(ModelError, match=r"no causal language model from this t5 config\.json"):
        inspect_model(Checkpoint(folder))


def test_an_unknown_model_type_is_refused(tmp_path: Path) -> None:
    folder = write_config(tmp_path, FAMILIES["llama"](), model_type="lama")

    with pytest.raises(ModelError, match=r"transformers cannot read .*config\.json: .*lama"):
        inspect_model(Checkpoint(folder))


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"hidden_size": 30}, "hidden size is not divisible by the number of attention heads"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"hidden_act": "glu9"}, "glu9"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "no 'spiral'"),
        ({"num_hidden_layers": 2**64}, r"num_hidden_layers is 18,446,.*more than 10,000"),
        ({"text_config": {"n_layer": 10**9}}, "n_layer is 1,000,000,000"),
    ],
)
def test_a_configuration_that_makes_no_model_is_refused(
    tmp_path: Path, entries: dict[str, Any], reason: str
) -> None:
    folder = write_config(tmp_path, FAMILIES["gpt_neox"](), **entries)

    with pytest.raises(ModelError, match=reason):
        inspect_model(Checkpoint(folder))


def test_of_two_lists_the_one_that_text_passes_has_the_blocks(tmp_path: Path) -> None:
    text = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96}
    vision = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 48}
    config = transformers.Gemma3Config(
        text_config=text | sizes,
        vision_config=vision | {"num_attention_heads": 4, "image_size": 28, "patch_size": 14},
    )
    folder = write_model(tmp_path, config)

    layout = inspect_model(Checkpoint(folder))
    assert layout.blocks == tuple(f"model.language_model.layers.{i}" for i in range(2))


def test_blocks_whose_linears_no_text_reaches_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(module: Any, input_ids: torch.Tensor, **_: Any) -> Any:
        return module.embed_tokens(input_ids)

    monkeypatch.setattr(transformers.LlamaModel, "forward", forward)
    folder = write_config(tmp_path, FAMILIES["llama"]())

    with pytest.raises(
        ModelError, match=r"text passes through no linear layer of model\.layers\.0"
    ):
        inspect_model(Checkpoint(folder))


def test_matrices_that_no_linear_holds_are_named_with_who_holds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scaled(module: Any, input: torch.Tensor) -> torch.Tensor:
        return 2 * (input @ module.weight.T)

    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    folder = write_model(tmp_path, transformers.FalconConfig(vocab_size=96, **sizes))
    layers = len(inspect_model(Checkpoint(folder)).layers)
    monkeypatch.setattr("transformers.models.falcon.modeling_falcon.FalconLinear.forward", scaled)

    assert layers == 8
    with pytest.raises(
        ModelError,
        match=r"FalconForCausalLM has no list of blocks with linear layers.*: "
        r"the matrices of transformer\.h are held by FalconLinear$",
    ):
        inspect_model(Checkpoint(folder))


def test_blocks_that_hand_on_more_than_hidden_states_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="leave tensors for later blocks"):
        inspect_model(Checkpoint(write_config(tmp_path, gemma4(shared=2))))


def test_what_blocks_leave_and_no_later_one_reads_does_not_matter(tmp_path: Path) -> None:
    transformers.AutoModelForCausalLM.from_config(gemma4(shared=0)).save_pretrained(tmp_path)
    layout = inspect_model(Checkpoint(tmp_path))
    assert len(layout.blocks) == 4
