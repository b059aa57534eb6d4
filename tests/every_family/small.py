"""Small configurations of any causal language model of transformers, from its own defaults.

A default configuration is taken, whatever names a size is given a small one, in the parts too, and
layer lists are left to the class, but that each kind of layer is there.
"""

from typing import Any

import torch
import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from tests.families import VOCABULARY, drawn_wider

MOST_PARAMETERS = 3_000_000

_WORDS = {
    32: """hidden_size d_model n_embd embedding_size emb_dim word_embed_proj_dim embedding_dim
        attention_hidden_size lru_width input_embedding_size output_embedding_size
        backbone_hidden_size dim_model_base""",
    48: """intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_inner dff ffn_hidden_size
        feed_forward_size shared_intermediate_size dim_ff moe_intermediate_size n_inner
        shared_expert_intermediate_size intermediate_size_mlp expert_ffn_hidden_size
        dense_intermediate_size mamba_d_ssm moe_shared_expert_intermediate_size
        shared_experts_intermediate_size""",
    2: """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_blocks
        num_decoder_layers num_encoder_layers num_key_value_heads swa_num_key_value_heads
        linear_num_key_heads linear_num_value_heads num_kv_heads num_query_groups n_groups
        num_experts_per_tok num_experts_per_token moe_topk eos_token_id""",
    4: """num_attention_heads n_head n_heads num_heads decoder_attention_heads attention_heads
        encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads
        swa_num_attention_heads mamba_n_heads mamba_num_heads linear_num_heads
        num_local_experts num_experts n_routed_experts moe_num_experts""",
    8: """head_dim d_head swa_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim
        v_head_dim qk_nope_head_dim qk_rope_head_dim global_head_dim attention_head_dim
        index_head_dim kv_channels rotary_dim dim_head attention_head_size
        sliding_window attention_window_size window_size attention_chunk_size
        sliding_window_size mamba_chunk_size chunk_size local_attention
        q_lora_rank kv_lora_rank o_lora_rank mamba_dt_rank time_step_rank mamba_d_state
        state_size ssm_state_size hidden_size_per_layer_input laurel_rank adapter_rank
        index_topk hc_lowrank""",
    64: """max_position_embeddings n_positions n_ctx context_length max_seq_len model_max_length
        max_target_positions max_source_positions""",
    VOCABULARY: """vocab_size vocab_size_per_layer_input encoder_hash_byte_group_vocab
        unpadded_vocab_size decoder_vocab_size ngram_vocab_size_base""",
    1: "n_group num_expert_group topk_group first_k_dense_replace bos_token_id",
    16: "mamba_d_head mamba_head_dim mamba_headdim",
    28: "image_size",
    14: "patch_size",
    0: "pad_token_id",
}
SIZES = {name: size for size, names in _WORDS.items() for name in names.split()}

_DOTS3: dict[str, Any] = {"layer_types": ["full_attention"] * 2, "head_dim": 16}

# What a class's own checks, or a list of fixed length, need besides, by model type.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "blt": {
        "patcher_config": {"hidden_size": 32},
        "encoder_config": {"hidden_size_global": 64},
        "decoder_config": {"hidden_size_global": 64},
        "global_config": {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8},
    },
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {"text_config": {**_DOTS3, "per_layer_config": {}}},
    "dots3_note_text": _DOTS3,
    "ernie4_5_moe": {"moe_k": 2},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "gemma3n_text": {
        "intermediate_size": 48,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 2},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "num_buckets": 2,
    },
    "roc_bert": {"pronunciation_vocab_size": VOCABULARY, "shape_vocab_size": VOCABULARY},
    "rwkv": {"rescale_every": 1},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "hybrid"] * 3,
        "num_key_value_heads": 4,
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "n_mamba_heads": 4,
        "num_key_value_heads": 4,
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def model_types() -> list[str]:
    """Every model type that AutoModelForCausalLM builds, sorted."""
    return sorted({config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING})


def class_of(model_type: str) -> str:
    """The class that AutoModelForCausalLM builds of a model type."""
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[transformers.CONFIG_MAPPING[model_type]]
    return str(found.__name__)


def small_config(model_type: str) -> PreTrainedConfig:
    """A configuration of the type that makes a model of some thousand weights.

    Raises:
        ValueError: What it makes is not small; and whatever the class itself raises.
    """
    return _small(transformers.CONFIG_MAPPING[model_type], OVERRIDES.get(model_type, {}))


def _small(config_class: type[PreTrainedConfig], more: dict[str, Any]) -> PreTrainedConfig:
    try:
        default = config_class()
    except ValueError:  # one type's defaults do not pass its own checks
        default = config_class(**more)
    wanted: dict[str, Any] = {}
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            wanted[name] = _small(type(value), more.get(name, {})).to_dict() | more.get(name, {})
        elif name in SIZES and isinstance(value, int | None) and not isinstance(value, bool):
            wanted[name] = SIZES[name] if value is not None else None
    if "kv_lora_rank" in wanted:  # latent attention gives every head its keys
        wanted["num_key_value_heads"] = wanted["num_attention_heads"]
    kinds = list(dict.fromkeys(vars(default).get("layer_types") or ()))
    if len(kinds) > 1 and "num_hidden_layers" in wanted:
        wanted |= {"layer_types": kinds, "num_hidden_layers": len(kinds)}
    flat = {name: value for name, value in more.items() if name not in default.sub_configs}
    return config_class(**(wanted | flat))


def small_model(model_type: str) -> Any:
    """A model of the type with random weights, in evaluation mode.

    Weights are drawn as wide as their inputs allow, so that a wrong layer shows in the logits.

    Raises:
        ValueError: It is not small; and whatever the class itself raises.
    """
    config = small_config(model_type)
    torch.manual_seed(0)
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"what sizes it has by its defaults make {count:,} parameters")
    return drawn_wider(AutoModelForCausalLM.from_config(config)).eval()
