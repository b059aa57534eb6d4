"""Both models block by block give what two whole models give: the dense and the compressed one."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress_core.errors import NumericsError
from compress_core.hf.loading import load_model
from compress_core.hf.prefix import PrefixStream
from compress_core.hf.stream import BlockStream
from compress_core.stats import PrefixAccumulator, PrefixStats, StackOfBatch
from tests.contracts.more_families import MORE
from tests.contracts.streams import open_stream, save
from tests.families import FAMILIES, token_batch

Weights = dict[str, Tensor]  # layer -> (out, in)
EXACT = [*FAMILIES, *MORE]
EXACT.remove("mamba")  # its convolution rounds by the layout of its input


@dataclass
class Whole:
    """What hooks on a whole model saw."""

    hidden: list[Tensor]  # output of each block
    inputs: dict[str, Tensor]  # (samples, length, in) of each linear


def run_whole(folder: Path, stream: BlockStream, tokens: Tensor, weights: Weights) -> Whole:
    """The model loaded by transformers, with some weights exchanged."""
    model = load_model(folder)
    seen = Whole([], {})

    def keep_input(name: str) -> Any:
        def hook(_: nn.Module, args: Any) -> None:
            seen.inputs[name] = args[0].reshape(len(tokens), -1, args[0].shape[-1]).clone()

        return hook

    def keep_output(_: nn.Module, __: Any, output: Any) -> None:
        seen.hidden.append((output[0] if isinstance(output, tuple | list) else output).clone())

    for layer in stream.layout.layers:
        module = model.get_submodule(layer.name)
        if layer.name in weights:
            weight = weights[layer.name]
            module.weight.data.copy_(weight.T if layer.transposed else weight)
        module.register_forward_pre_hook(keep_input(layer.name))
    for path in stream.layout.blocks:
        model.get_submodule(path).register_forward_hook(keep_output)
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    return seen


def other_weights(stream: BlockStream, *names: str) -> Weights:
    """Random weights for the named layers, or for all."""
    generator = torch.Generator().manual_seed(5)
    made = {
        layer.name: torch.randn(layer.out_features, layer.in_features, generator=generator)
        * layer.in_features**-0.5
        for layer in stream.layout.layers
    }
    return {name: made[name] for name in names or made}


def of_block(stream: BlockStream, weights: Mapping[str, Tensor], block: int) -> Weights:
    return {x.name: weights[x.name] for x in stream.layout.of_block(block) if x.name in weights}


def accumulators(stream: BlockStream, block: int) -> dict[str, PrefixAccumulator]:
    taps = stream.layout.taps(block)
    return {tap: PrefixAccumulator(layers[0].in_features) for tap, layers in taps.items()}


def compare(stats: PrefixStats, dense: Tensor, inputs: Tensor) -> None:
    rows, of_dense = (x.reshape(-1, x.shape[-1]).double() for x in (inputs, dense))
    assert stats.tokens == len(rows)
    torch.testing.assert_close(stats.gram, rows.T @ rows, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(stats.cross, of_dense.T @ rows, rtol=1e-10, atol=1e-10)
    assert torch.equal(stats.gram, stats.gram.T)


@pytest.mark.parametrize("family", EXACT)
def test_both_models_are_the_whole_models(family: str, tmp_path: Path) -> None:
    """Blocks behind exchanged ones, their inputs with every layer of their own exchanged too."""
    stream = open_stream(save(family, tmp_path))
    tokens, weights = token_batch(rows=3, length=9), other_weights(stream)
    dense, small = (run_whole(tmp_path, stream, tokens, found) for found in ({}, weights))
    pair = PrefixStream(stream, batch_size=3)
    states = stream.embed(tokens, 3)
    hidden = states.clone()
    for block in range(len(stream.layout.blocks)):
        inside = of_block(stream, weights, block)
        sums = accumulators(stream, block)
        before = states.clone(), hidden.clone()
        pair.measure(block, states, hidden, inside, sums)
        assert torch.equal(states, before[0]) and torch.equal(hidden, before[1])
        for tap, layers in stream.layout.taps(block).items():
            for layer in layers:
                compare(sums[tap].finish(), dense.inputs[layer.name], small.inputs[layer.name])
        error = pair.advance(block, states, hidden, inside)
        assert torch.equal(states, dense.hidden[block])
        assert torch.equal(hidden, small.hidden[block])
        difference = (hidden.double() - states.double()).square().sum()
        expected = float(difference / states.double().square().sum())
        assert error == pytest.approx(expected, rel=1e-12) and error > 0.01


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_any_batch_size_will_do(batch_size: int, tmp_path: Path) -> None:
    stream = open_stream(save("llama", tmp_path))
    tokens, weights = token_batch(rows=3, length=9), other_weights(stream)
    dense, small = (run_whole(tmp_path, stream, tokens, found) for found in ({}, weights))
    pair = PrefixStream(stream, batch_size)
    states = stream.embed(tokens, batch_size)
    hidden = states.clone()
    pair.advance(0, states, hidden, of_block(stream, weights, 0))
    torch.testing.assert_close(hidden, small.hidden[0], rtol=1e-5, atol=1e-5)
    sums = accumulators(stream, 1)
    told: list[tuple[int, int]] = []
    pair.measure(1, states, hidden, {}, sums, lambda done, total: told.append((done, total)))
    assert told[-1] == (3, 3) and len(told) == -(-3 // batch_size)
    tap = "model.layers.1.self_attn.q_proj"
    rows = small.inputs[tap].double().flatten(0, 1)
    torch.testing.assert_close(sums[tap].finish().gram, rows.T @ rows, rtol=1e-4, atol=1e-4)
    rows = dense.inputs[tap].double().flatten(0, 1)
    assert not torch.allclose(sums[tap].finish().gram, rows.T @ rows, rtol=1e-2)


def test_layers_that_are_not_named_stay_dense(tmp_path: Path) -> None:
    """Step by step: o_proj behind compressed q, k, v, the rest of the block not yet compressed."""
    stream = open_stream(save("llama", tmp_path))
    tokens = token_batch(rows=2, length=9)
    names = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    weights = other_weights(stream, *names)
    dense, small = (run_whole(tmp_path, stream, tokens, found) for found in ({}, weights))
    states = stream.embed(tokens, 2)
    tap = "model.layers.0.self_attn.o_proj"
    sums = {tap: accumulators(stream, 0)[tap]}
    PrefixStream(stream, 2).measure(0, states, states.clone(), weights, sums)
    compare(sums[tap].finish(), dense.inputs[tap], small.inputs[tap])
    assert not torch.equal(dense.inputs[tap], small.inputs[tap])


def test_a_model_that_is_not_compressed_is_its_own_prefix(tmp_path: Path) -> None:
    stream = open_stream(save("llama", tmp_path))
    states = stream.embed(token_batch(), 2)
    hidden, pair = states.clone(), PrefixStream(stream, 2)
    sums = accumulators(stream, 0)
    pair.measure(0, states, hidden, {}, sums)
    for accumulator in sums.values():
        stats = accumulator.finish()
        torch.testing.assert_close(stats.cross, stats.gram, rtol=1e-14, atol=1e-12)
    assert pair.advance(0, states, hidden, {}) == 0.0
    assert torch.equal(states, hidden)


def test_the_dense_weights_are_there_again(tmp_path: Path) -> None:
    stream = open_stream(save("gpt2", tmp_path))
    states = stream.embed(token_batch(), 2)
    expected = states.clone()
    stream.run_block(0, expected, 2)
    pair = PrefixStream(stream, 2)
    inside = of_block(stream, other_weights(stream), 0)
    pair.measure(0, states, states.clone(), inside, accumulators(stream, 0))
    broken = other_weights(stream, "transformer.h.0.mlp.c_proj")
    broken["transformer.h.0.mlp.c_proj"][0, 0] = torch.nan
    pair.advance(0, states.clone(), states.clone(), broken)
    stream.run_block(0, states, 2)
    assert torch.equal(states, expected)


def test_bf16_models_are_measured_in_float64(tmp_path: Path) -> None:
    stream = open_stream(save("llama", tmp_path, torch.bfloat16))
    tokens = token_batch(rows=2, length=9)
    weights = {name: weight.bfloat16() for name, weight in other_weights(stream).items()}
    dense, small = (run_whole(tmp_path, stream, tokens, found) for found in ({}, weights))
    states = stream.embed(tokens, 2)
    hidden, pair = states.clone(), PrefixStream(stream, 2)
    pair.advance(0, states, hidden, of_block(stream, weights, 0))
    assert hidden.dtype is torch.bfloat16 and torch.equal(hidden, small.hidden[0])
    sums = accumulators(stream, 1)
    pair.measure(1, states, hidden, of_block(stream, weights, 1), sums)
    for tap, accumulator in sums.items():
        compare(accumulator.finish(), dense.inputs[tap], small.inputs[tap])


@pytest.mark.parametrize("which", ["dense", "compressed"])
def test_what_is_not_finite_names_layer_and_sample(which: str, tmp_path: Path) -> None:
    stream = open_stream(save("llama", tmp_path))
    states = stream.embed(token_batch(rows=5, length=9), 2)
    hidden = states.clone()
    (states if which == "dense" else hidden)[3, 2, 1] = torch.nan
    tap = "model.layers.0.mlp.gate_proj"
    sums = {tap: accumulators(stream, 0)[tap]}
    with pytest.raises(NumericsError, match=f"layer {tap}: input is not finite .* sample 3"):
        PrefixStream(stream, 2).measure(0, states, hidden, {}, sums)


def test_stack_of_batch_averages_the_samples_of_a_bucket(tmp_path: Path) -> None:
    stream = open_stream(save("llama", tmp_path))
    tokens, weights = token_batch(rows=5, length=9), other_weights(stream)
    dense, small = (run_whole(tmp_path, stream, tokens, found) for found in ({}, weights))
    pair = PrefixStream(stream, 2)
    states = stream.embed(tokens, 2)
    hidden = states.clone()
    pair.advance(0, states, hidden, of_block(stream, weights, 0))
    tap, buckets = "model.layers.1.mlp.down_proj", [1, 0, 0, 1, 0]
    sums = {tap: StackOfBatch(48, buckets)}
    pair.measure(1, states, hidden, of_block(stream, weights, 1), sums)
    means = [
        torch.stack(
            [
                found.inputs[tap][[1, 2, 4]].double().mean(0),
                found.inputs[tap][[0, 3]].double().mean(0),
            ]
        )
        for found in (dense, small)
    ]
    stats = sums[tap].finish()
    assert stats.tokens == 2 * 9
    rows, of_dense = means[1].flatten(0, 1), means[0].flatten(0, 1)
    torch.testing.assert_close(stats.gram, rows.T @ rows, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stats.cross, of_dense.T @ rows, rtol=1e-4, atol=1e-4)
