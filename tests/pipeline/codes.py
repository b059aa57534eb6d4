"""Tiny models whose numbers are stored in codes, and runs of them that several tests look at."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from tests.pipeline import pico

BLOCKS = {"llama": 2, "gpt2": 1, "biased": 1}  # one block has every kind of layer
LAYERS = 7 * BLOCKS["llama"]


def biased(vocabulary: int, blocks: int) -> PreTrainedConfig:
    """A Llama whose layers have biases, in bfloat16."""
    config = pico.llama(vocabulary, blocks)
    config.attention_bias = config.mlp_bias = True
    config.dtype = torch.bfloat16
    return config


MODELS: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama": pico.llama,
    "gpt2": pico.gpt2,
    "biased": biased,
}


def make_models(root: Path) -> dict[str, pico.Inputs]:
    """The models by name."""
    return {
        name: pico.make_inputs(root / name, config=partial(config, blocks=BLOCKS[name]))
        for name, config in MODELS.items()
    }


class Walks:
    """Runs that are made once: of a model's own home, so that they find what others left.

    Args:
        root: Where models and homes go.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.models = root, make_models(root / "models")
        self._walks: dict[str, pico.Walk] = {}

    def settings(self, model: str, method: str, kept: float, **changes: Any) -> dict[str, Any]:
        """Of a run in the model's home."""
        home = self.root / "homes" / model
        return self.models[model].settings(home, method=method, kept=kept, **changes)

    def get(self, model: str, method: str, kept: float) -> pico.Walk:
        """The first walk of a model, a method and a budget."""
        name = f"{model} {method} {kept}"
        if name not in self._walks:
            self._walks[name] = pico.walk(self.settings(model, method, kept))
        return self._walks[name]
