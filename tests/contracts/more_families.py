"""Tiny models beyond the promised families: what the code finds by type and shape alone.

Their blocks differ in masks, rotary tables, output or kind, which block-by-block running must not
notice.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers

from tests.families import FAMILIES, VOCABULARY, tiny_model

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
_OLD: dict[str, Any] = {"vocab_size": VOCABULARY, "n_layer": 2, "n_head": 4}

MORE: dict[str, Callable[[], Any]] = {
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **_SIZES, num_hidden_layers=3, head_dim=16, sliding_window=4, layer_types=_MIXED
    ),
    "qwen2_sliding": lambda: transformers.Qwen2Config(
        **_SIZES,
        num_hidden_layers=3,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=1,
    ),
    "mistral_narrow": lambda: transformers.MistralConfig(
        **_SIZES, num_hidden_layers=2, sliding_window=4
    ),
    "bloom": lambda: transformers.BloomConfig(**_OLD, hidden_size=32),
    "openai_gpt": lambda: transformers.OpenAIGPTConfig(**_OLD, n_embd=32, n_positions=64),
    "qwen3_5": lambda: transformers.Qwen3_5TextConfig(
        **_SIZES,
        num_hidden_layers=2,
        head_dim=16,
        layer_types=["linear_attention", "full_attention"],
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
    ),
    "gemma4": lambda: gemma4(shared=0),
    "mamba": lambda: transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0
    ),
}


def gemma4(shared: int) -> Any:
    """A Gemma 4 whose last so many blocks read keys and values of earlier ones."""
    return transformers.Gemma4TextConfig.from_dict(
        {
            **_SIZES,
            "head_dim": 16,
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 8 if shared else 0,  # the small ones have both
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": shared,
            "sliding_window": 4,
        }
    )


def any_model(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of one of FAMILIES or MORE with random weights."""
    if family in FAMILIES:
        return tiny_model(family, dtype=dtype)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(MORE[family]()).to(dtype).eval()
