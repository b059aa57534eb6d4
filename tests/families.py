"""Tiny models of every family the product promises, built from transformers' own config classes.

Each keeps what makes its family special: grouped queries, biases, tied embeddings, fused
projections, GPT-2's transposed Conv1D. A family is one line in FAMILIES.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

VOCABULARY = 96

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED: dict[str, Any] = {**_SIZES, "num_key_value_heads": 2}
_GEMMA: dict[str, Any] = {**_GROUPED, "head_dim": 16}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OPT: dict[str, Any] = {
    **{name: size for name, size in _SIZES.items() if name != "intermediate_size"},
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "pad_token_id": 0,
}

FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**_GROUPED),
    "llama_tied": lambda: transformers.LlamaConfig(**_GROUPED, tie_word_embeddings=True),
    "llama_bias": lambda: transformers.LlamaConfig(**_GROUPED, attention_bias=True, mlp_bias=True),
    "qwen2": lambda: transformers.Qwen2Config(**_GROUPED, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**_GROUPED, head_dim=16),
    "mistral": lambda: transformers.MistralConfig(**_GROUPED, sliding_window=32),
    "gemma": lambda: transformers.GemmaConfig(**_GEMMA),
    "gemma2": lambda: transformers.Gemma2Config(**_GEMMA, sliding_window=32),
    "gpt2": lambda: transformers.GPT2Config(**_GPT2),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_SIZES),
    "opt": lambda: transformers.OPTConfig(**_OPT),
    "phi": lambda: transformers.PhiConfig(**_SIZES),
    "phi3": lambda: transformers.Phi3Config(**_GROUPED),
}


def tiny_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal model of the family with random weights, in evaluation mode.

    The weights are drawn wider than for training, and the biases too, so that logits differ from
    token to token and a wrong layer shows in them.
    """
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]())
    made: PreTrainedModel = drawn_wider(model).to(dtype).eval()
    return made


@torch.no_grad()
def drawn_wider(model: Any) -> Any:
    """The model, its matrices and biases drawn anew so that a wrong one shows in the logits."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        elif name.endswith("bias"):
            parameter.normal_(std=0.1)
    return model


def linear_names(model: PreTrainedModel) -> list[str]:
    """The names of every linear layer in the model's blocks (Conv1D counts), the head left out."""
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if module is not head
        and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
    ]


def token_batch(seed: int = 0, rows: int = 2, length: int = 12) -> torch.Tensor:
    """Random token ids (rows, length) within the vocabulary, the special ones left out."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)
