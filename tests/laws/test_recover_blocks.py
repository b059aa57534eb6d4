"""Recovery block by block betters each block's output, worsens none, and can stop anywhere."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress_core.decompose import LowRank
from compress_core.errors import ConfigError, NumericsError
from compress_core.folder.stream import FolderStream
from compress_core.folder.write import CompressedWeights
from compress_core.hf.checkpoint import Checkpoint
from compress_core.hf.layout import inspect_model
from compress_core.learn.loop import NoCheckpoints, Training
from compress_core.recover.blocks import CURVES, BlockError, block_tensors, recover_block
from compress_core.recover.recovery import Recovered
from compress_core.recover.settings import Recovery
from compress_core.recover.windows import split_windows
from tests.families import linear_names, tiny_model, token_batch
from tests.laws.test_recover import Breaking, same
from tests.pipeline.contents import sizes_of_layer, sparse_layers, stores, varied_layers
from tests.pipeline.folders import make_pair

WINDOWS = token_batch(rows=24, length=16)
RECOVERY = Recovery("factors", steps=30, batch=4, text=0.0)
Layers = Callable[[Any], list[CompressedWeights]]


def near(form: str = "plain", names: Callable[[str], bool] = lambda name: True) -> Layers:
    """Every named layer's own weight, cut to three quarters of the ranks that pay."""

    def make(model: Any) -> list[CompressedWeights]:
        found = []
        for name in filter(names, linear_names(model)):
            layer = model.get_submodule(name)
            rows, inputs = sizes_of_layer(layer)
            weight = layer.weight.T if type(layer).__name__ == "Conv1D" else layer.weight
            u, s, v = torch.linalg.svd(weight.detach().float(), full_matrices=False)
            rank = rows * inputs // (rows + inputs) * 3 // 4
            low = LowRank((u * s)[:, :rank].contiguous(), v[:rank].contiguous())
            found.append(stores(name, low, model.dtype, form))
        return found

    return make


class Case:
    """A compressed folder, its dense model, and the hidden states around each block."""

    def __init__(
        self,
        folder: Path,
        layers: Layers | None = None,
        family: str = "llama",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        model = tiny_model(family, dtype=dtype)
        pair = make_pair(model, folder, layers=layers or near())
        checkpoint = Checkpoint(pair.dense)
        self.stream = FolderStream(checkpoint, inspect_model(checkpoint), pair.small)
        self.states = []  # what enters a block in the compressed model, what leaves it in the dense
        dense = self.stream.embed(WINDOWS, 8)
        hidden = dense.clone()
        for block in range(len(self.stream.layout.blocks)):
            self.stream.run_block(block, dense, 8)
            self.states.append((hidden.clone(), dense.clone()))
            with self.stream.loaded_compressed(block):
                self.stream.advance(block, hidden, 8)

    def run(
        self,
        block: int = 1,
        checkpoints: Any = None,
        states: tuple[Tensor, Tensor] | None = None,
        look: Callable[[nn.Module], None] = lambda module: None,
    ) -> Recovered:
        """Recovers a block; ``look`` is given the module afterwards."""
        training = Training(WINDOWS, "cpu", 4, 0, checkpoints or NoCheckpoints())
        with self.stream.loaded_compressed(block) as module:
            given = states or self.states[block]
            found = recover_block(self.stream, block, module, RECOVERY, given, training)
            look(module)
        return found

    def trained(self, block: int = 1) -> dict[str, Tensor]:
        """Key to tensor of what is trained, as it is in the folder."""
        with self.stream.loaded_compressed(block) as module:
            tensors = block_tensors(self.stream, block, module)
            return {stored.name: stored.get().clone() for stored in tensors}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("block", [0, 1])
def test_a_block_comes_nearer_to_the_dense_one_and_nothing_else_moves(
    case: Case, block: int
) -> None:
    path = case.stream.layout.blocks[block]
    with case.stream.loaded_compressed(block) as module:
        before = {f"{path}.{n}": x.detach().clone() for n, x in module.named_parameters()}
    after: dict[str, Tensor] = {}

    def look(module: nn.Module) -> None:
        after.update({f"{path}.{n}": x.detach().clone() for n, x in module.named_parameters()})

    found = case.run(block, look=look)
    assert found.report["best"] < 0.95 * found.report["start"]
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(found.tensors)
    assert same({name: after[name] for name in changed}, found.tensors)
    assert set(found.curves) == set(CURVES.values())
    watched = found.curves["held_back"]
    assert float(watched[~watched.isnan()].min()) == found.report["best"]


def test_the_error_is_that_of_the_formula(case: Case) -> None:
    """Mean over windows and tokens of ‖y - y_dense‖² / ‖y_dense‖², in float64."""
    inputs, targets = case.states[1]
    picks = torch.tensor([3, 0, 9, 4, 20])
    sizes = (4, 1)
    with case.stream.loaded_compressed(1):
        for size in sizes:
            case.stream.prepare(WINDOWS[:size], size)
        outputs = torch.cat([case.stream.forward(1, inputs[p]) for p in picks.split(4)]).double()
        found = BlockError(case.stream, 1, inputs, targets, 4).mean(picks)
    wanted = targets[picks].double()
    error = (outputs - wanted).square().sum(-1) / wanted.square().sum(-1)
    assert found == pytest.approx(float(error.mean()), rel=1e-6)


def test_a_start_that_cannot_be_bettered_comes_back_bit_for_bit(tmp_path: Path) -> None:
    case = Case(tmp_path, sparse_layers)
    inputs, _ = case.states[1]
    own = inputs.clone()
    with case.stream.loaded_compressed(1):
        for rows in (1, 4):
            case.stream.prepare(WINDOWS[:rows], rows)
        case.stream.advance(1, own, 4)
    before = case.trained()
    found = case.run(states=(inputs, own))
    assert found.report["start"] < 1e-9
    assert same(found.tensors, before)


def test_what_is_measured_is_what_is_stored(tmp_path: Path) -> None:
    case = Case(tmp_path, dtype=torch.bfloat16)
    found = case.run()
    assert {tensor.dtype for tensor in found.tensors.values()} == {torch.bfloat16}
    _, held = split_windows(WINDOWS, RECOVERY.held_back, RECOVERY.seed)
    with case.stream.loaded_compressed(1, found.tensors):
        error = BlockError(case.stream, 1, *case.states[1], RECOVERY.batch).mean(held)
    assert error == found.report["best"] < found.report["start"]


@pytest.mark.parametrize(
    ("layers", "special"),
    [
        (varied_layers, {"factor_in", "columns"}),
        (sparse_layers, {"sparse_values", "bias"}),
        (near("pivot"), {"pivot_in"}),
    ],
)
def test_columns_sparse_values_pivots_and_biases_train_too(
    layers: Layers, special: set[str], tmp_path: Path
) -> None:
    case = Case(tmp_path, layers)
    before = case.trained()
    with case.stream.loaded_compressed(1) as module:
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    after: dict[str, Tensor] = {}
    found = case.run(look=lambda module: after.update(module.named_buffers()))
    assert found.report["best"] < found.report["start"]
    assert same(buffers, after)
    changed = {name for name in before if not torch.equal(before[name], found.tensors[name])}
    assert special <= {name.rpartition(".")[2] for name in changed}


def test_an_in_factor_of_several_blocks_stays_and_one_of_a_single_block_is_trained_once(
    tmp_path: Path,
) -> None:
    """In block 0 of ``varied_layers`` are the owners, whose factors layers of block 1 use, too."""

    def inside(model: Any) -> list[CompressedWeights]:
        made = {layer.name: layer for layer in varied_layers(model)}
        first, second = (made[f"model.layers.0.self_attn.{x}_proj"] for x in "qk")
        assert second.entry["factor_in"] == first.name
        return [first, second]

    wide, narrow = Case(tmp_path / "wide", varied_layers), Case(tmp_path / "narrow", inside)
    factor = "model.layers.0.self_attn.q_proj.factor_in"
    assert factor in wide.stream.tied
    assert factor not in wide.trained(0)
    assert "model.layers.0.self_attn.q_proj.weight" in wide.trained(0)
    assert not any(name in wide.stream.tied for name in wide.trained(1))
    assert [name for name in narrow.trained(0) if name.endswith("factor_in")] == [factor]

    def look(module: Any) -> None:
        assert module.self_attn.q_proj.factor_in is module.self_attn.k_proj.factor_in

    before = narrow.trained(0)[factor]
    assert not torch.equal(narrow.run(0, look=look).tensors[factor], before)


VECTORS = {
    "llama_bias": {"input_layernorm.weight", "post_attention_layernorm.weight"},
    "qwen3": {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "self_attn.q_norm.weight",
        "self_attn.k_norm.weight",
    },
    "gpt2": {"ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"},
    "opt": {
        "self_attn_layer_norm.weight",
        "self_attn_layer_norm.bias",
        "final_layer_norm.weight",
        "final_layer_norm.bias",
    },
    "gpt_neox": {
        "input_layernorm.weight",
        "input_layernorm.bias",
        "post_attention_layernorm.weight",
        "post_attention_layernorm.bias",
    },
}


@pytest.mark.parametrize("family", VECTORS)
def test_norms_train_whatever_they_are_called_and_dense_layers_do_not(
    family: str, tmp_path: Path
) -> None:
    case = Case(tmp_path, near(names=lambda name: name.endswith(PART_OF[family])), family)
    stream = case.stream
    (name,) = [x.name for x in stream.layout.of_block(1) if x.name in stream.entries]
    path = stream.layout.blocks[1]
    stored = {"weight", "factor_in"} | (
        {"bias"} if f"{name}.bias" in stream.layout.stored else set()
    )
    wanted = {stream.key(f"{path}.{vector}") for vector in VECTORS[family]}
    wanted |= {stream.key(f"{name}.{part}") for part in stored}
    found = case.run()
    assert set(found.tensors) == wanted
    assert found.report["best"] < found.report["start"]


PART_OF = {
    "llama_bias": "down_proj",
    "qwen3": "up_proj",
    "gpt2": "c_attn",
    "opt": "fc1",
    "gpt_neox": "dense_4h_to_h",
}


def test_a_block_whose_layers_are_all_dense_stays_as_it_is(tmp_path: Path) -> None:
    case = Case(tmp_path, near(names=lambda name: ".0." in name))
    assert case.run(1) == Recovered({}, {}, {})
    assert case.run(0).tensors


@pytest.mark.parametrize("dies_at", [1, 4, 9, 14])
def test_interrupted_anywhere_it_ends_the_same(case: Case, dies_at: int) -> None:
    straight = case.run()
    checkpoints = Breaking(dies_at)
    with pytest.raises(KeyboardInterrupt):
        case.run(checkpoints=checkpoints)
    again = case.run(checkpoints=checkpoints)
    assert same(straight.tensors, again.tensors)
    assert straight.report == again.report
    assert same(nothing_for_nan(straight.curves), nothing_for_nan(again.curves))


def nothing_for_nan(curves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: curve.nan_to_num(-1) for name, curve in curves.items()}


def test_an_error_that_is_not_finite_names_block_and_step(case: Case) -> None:
    inputs, targets = (states.clone() for states in case.states[1])
    inputs[:, 3] = torch.inf
    with pytest.raises(NumericsError, match=r"block model\.layers\.1 is not finite at step 0"):
        case.run(states=(inputs, targets))


def test_too_few_windows_are_refused(case: Case) -> None:
    training = Training(WINDOWS[:3], "cpu", 4, 0)
    with (
        case.stream.loaded_compressed(1) as module,
        pytest.raises(ConfigError, match="holds 2 of 3 calibration windows back"),
    ):
        recover_block(case.stream, 1, module, RECOVERY, case.states[1], training)
