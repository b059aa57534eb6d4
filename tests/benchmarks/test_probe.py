"""A table of KL divergences, one layer changed at a time, against whole forwards."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compress_core.head import Halves
from compress_core.hf.checkpoint import Checkpoint
from compress_core.hf.layout import inspect_model
from compress_core.hf.loading import load_model
from compress_core.hf.probe import DenseLogits, KlProbe
from tests.benchmarks.conftest import Bench

CANDIDATES = 2
BATCH = 4


def test_a_table_of_divergences(bench: Bench, tmp_path: Path) -> None:
    """Share of the time that whole forwards take; both tables must agree."""
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=4096,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    drawn = LlamaForCausalLM(config)
    for parameter in drawn.parameters():
        if parameter.dim() == 2:  # wide enough for a layer to show in the logits
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    drawn.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    layout = inspect_model(Checkpoint(tmp_path))
    windows = torch.randint(0, config.vocab_size, (16, 128))
    layers = {layer: model.get_submodule(layer.name) for layer in layout.layers}
    table = [
        (layer, module, (module.weight.detach() * (1 - 0.1 * step)).contiguous())
        for layer, module in layers.items()
        for step in range(1, CANDIDATES + 1)
    ]
    probe = KlProbe(model, layout, windows, batch_size=BATCH, device="cpu")

    def probed() -> list[float]:
        probe.set_base({})
        found = []
        for layer, _, weight in table:
            probe.enter(layer.block)
            found.append(probe.measure({layer.name: weight}))
        return found

    batches = windows.split(BATCH)

    halves = Halves(model)

    @torch.no_grad()
    def whole() -> list[float]:
        found = []
        for _, module, weight in table:
            own, module.weight = module.weight, torch.nn.Parameter(weight)
            sums = [
                d.divergence_sum(halves.hidden(b)) for d, b in zip(references, batches, strict=True)
            ]
            module.weight = own
            found.append(sum(sums) / windows.numel())
        return found

    with torch.no_grad():
        references = [DenseLogits(halves, halves.hidden(batch), 1 << 30) for batch in batches]
    assert probed() == pytest.approx(whole(), rel=1e-3, abs=1e-7)
    ours, theirs = bench.seconds(probed, whole, rounds=2)
    bench.row(
        benchmark=f"probe, {len(table)} divergences",
        of_whole_forwards=f"{ours / theirs:.2f}",
        goal="at most 0.6",
    )
