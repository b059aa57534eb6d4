"""The probe answers what a whole forward with the same weights would, and harms no model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress_core.errors import ConfigError, NumericsError, TextError
from compress_core.hf.checkpoint import Checkpoint
from compress_core.hf.layout import inspect_model
from compress_core.hf.loading import load_model
from compress_core.hf.observe import tensors_in
from compress_core.hf.probe import KlProbe
from compress_core.hf.replay import record_block
from compress_core.types import ModelLayout
from tests.contracts.more_families import MORE, any_model
from tests.families import FAMILIES, token_batch

TOKENS = token_batch(rows=5, length=8)  # batches of 2: the last one is smaller


def close(expected: float) -> Any:
    """What float32 may round."""
    return pytest.approx(expected, rel=1e-4, abs=1e-6)


class Case:
    """A tiny model on disk, the probe of it, and the same answers the long way."""

    def __init__(self, folder: Path, batch_size: int = 2) -> None:
        self.layout: ModelLayout = inspect_model(Checkpoint(folder))
        self.model = load_model(folder)
        self.dense = load_model(folder)
        self.probe = KlProbe(self.model, self.layout, TOKENS, batch_size=batch_size, device="cpu")

    def other(self, name: str, seed: int = 0, share: float = 0.3) -> Tensor:
        """Another weight (out, in) for a layer."""
        ref = next(layer for layer in self.layout.layers if layer.name == name)
        weight = self.dense.get_submodule(name).weight.detach()
        weight = weight.T if ref.transposed else weight
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        return weight + share * weight.std() * noise.to(weight.dtype)

    def base(self) -> dict[str, Tensor]:
        """Another weight for every layer."""
        return {layer.name: self.other(layer.name, 7, 0.1) for layer in self.layout.layers}

    @torch.no_grad()
    def whole(self, weights: Mapping[str, Tensor]) -> float:
        """KL by a whole forward."""
        dense = self.dense(input_ids=TOKENS, use_cache=False).logits.double().log_softmax(-1)
        kept = {name: self.dense.get_submodule(name).weight.clone() for name in weights}
        for layer in self.layout.layers:
            if layer.name in weights:
                weight = weights[layer.name]
                stored = self.dense.get_submodule(layer.name).weight
                stored.copy_(weight.T if layer.transposed else weight)
        changed = self.dense(input_ids=TOKENS, use_cache=False).logits.double().log_softmax(-1)
        for name, weight in kept.items():
            self.dense.get_submodule(name).weight.copy_(weight)
        return float((dense.exp() * (dense - changed)).sum(-1).mean())

    def is_whole(self) -> bool:
        """Whether the model is as it was loaded, to the bit."""
        mine = {name: module for name, module in self.model.named_modules()}
        same = all(type(m) is type(mine[n]) for n, m in self.dense.named_modules())
        with torch.no_grad():
            ours, theirs = (m(input_ids=TOKENS).logits for m in (self.model, self.dense))
        return same and len(mine) == len(list(self.dense.modules())) and torch.equal(ours, theirs)

    def of_block(self, block: int) -> list[str]:
        """Names of its layers."""
        return [layer.name for layer in self.layout.of_block(block)]


def save(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A tiny model's folder, its weights wide enough for every layer to show in the logits."""
    model = any_model(family, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Case:
    return Case(save("llama", tmp_path))


@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_every_layer_measures_as_a_whole_forward(family: str, tmp_path: Path) -> None:
    case = Case(save(family, tmp_path))
    base = case.base()
    case.probe.set_base(base)

    for block in range(len(case.layout.blocks)):
        case.probe.enter(block)
        for name in case.of_block(block):
            change = {name: case.other(name)}
            expected = case.whole(base | change)
            assert expected > 1e-5
            assert case.probe.measure(change) == close(expected), name
    assert case.probe.base_kl() == close(case.whole(base))
    assert case.is_whole()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma3", "bloom"])
def test_layers_together_measure_as_a_whole_forward(family: str, tmp_path: Path) -> None:
    case = Case(save(family, tmp_path))
    base = case.base()
    case.probe.set_base(base)
    inside, later = case.of_block(0), case.of_block(1)

    groups = [[a, b] for a in inside for b in inside if a < b]
    for names in [*groups, inside, [inside[-1], later[0]], inside + later]:
        change = {name: case.other(name) for name in names}
        assert case.probe.measure(change) == close(case.whole(base | change))


def test_a_model_in_bf16(tmp_path: Path) -> None:
    case = Case(save("llama", tmp_path, torch.bfloat16))
    case.probe.enter(1)

    for name in case.of_block(1):
        change = {name: case.other(name)}
        assert case.probe.measure(change) == pytest.approx(case.whole(change), rel=0.05, abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_dense_base_is_at_zero(family: str, tmp_path: Path) -> None:
    probe = Case(save(family, tmp_path)).probe

    assert 0 <= probe.base_kl() < 1e-7
    probe.enter(1)
    assert 0 <= probe.base_kl() < 1e-7


def test_unchanged_weights_give_the_base(llama: Case) -> None:
    base = llama.base()
    llama.probe.set_base(base)
    name = llama.of_block(0)[2]

    assert llama.probe.measure({name: base[name]}) == llama.probe.base_kl() > 0
    assert llama.probe.measure({}) == llama.probe.base_kl()


def test_a_new_base_forgets_the_old_one(llama: Case) -> None:
    llama.probe.set_base(llama.base())
    llama.probe.enter(1)
    assert llama.probe.base_kl() > 1e-5

    base = {llama.of_block(1)[0]: llama.other(llama.of_block(1)[0])}
    llama.probe.set_base(base)
    assert llama.probe.base_kl() == close(llama.whole(base))


@pytest.mark.parametrize("order", [[2, 0, 1], [0, 2, 2], [1, 2, 0, 2]])
def test_blocks_may_be_entered_in_any_order(order: list[int], tmp_path: Path) -> None:
    case = Case(save("gemma3", tmp_path))
    base = case.base()
    case.probe.set_base(base)

    for block in order:
        case.probe.enter(block)
        change = {name: case.other(name) for name in case.of_block(block)[1:3]}
        assert case.probe.measure(change) == close(case.whole(base | change))


@pytest.mark.parametrize("batch_size", [1, 3, 9])
def test_the_batch_size_changes_rounding_only(batch_size: int, tmp_path: Path) -> None:
    case = Case(save("llama", tmp_path), batch_size)
    change = {name: case.other(name) for name in case.of_block(0)[-1:]}

    assert case.probe.measure(change) == close(case.whole(change))


def test_a_measurement_leaves_no_trace(llama: Case) -> None:
    llama.probe.set_base(llama.base())
    first, second = ({name: llama.other(name)} for name in llama.of_block(0)[:2])

    once = llama.probe.measure(first)
    assert llama.probe.measure(second) != once
    assert llama.probe.measure(first) == once
    assert llama.is_whole()


def test_what_is_not_finite_names_the_layers(llama: Case) -> None:
    name = llama.of_block(0)[3]
    before = llama.probe.base_kl()
    broken = torch.full_like(llama.other(name), torch.inf)

    with pytest.raises(NumericsError, match=rf"probe: with the weights of {name} the divergence"):
        llama.probe.measure({name: broken})
    assert llama.probe.measure({name: llama.other(name)}) > before
    assert llama.is_whole()


@pytest.mark.parametrize("block", [0, 1])
def test_an_error_inside_leaves_the_model_whole(block: int, llama: Case) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no more")

    name = llama.of_block(0)[0]
    change = {name: llama.other(name)}
    module = llama.model.get_submodule(f"{llama.layout.blocks[block]}.mlp.down_proj")
    expected = llama.probe.measure(change)
    for action in (lambda: llama.probe.measure(change), lambda: llama.probe.enter(1)):
        handle = module.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="no more"):
            action()
        handle.remove()
        assert llama.is_whole()
        llama.probe.set_base({})
    assert llama.probe.measure(change) == expected


def test_what_does_not_fit_is_refused(llama: Case) -> None:
    name, later = llama.of_block(0)[0], llama.of_block(1)[0]
    weight = llama.other(name)

    with pytest.raises(ConfigError, match="the model has no layer lm_head"):
        llama.probe.measure({"lm_head": weight})
    with pytest.raises(ConfigError, match="32 by 32, but its new weight has shape"):
        llama.probe.set_base({name: weight[:5]})
    with pytest.raises(ConfigError, match="is in block 1, but the probe has entered block 0"):
        llama.probe.measure({later: weight})
    llama.probe.enter(1)
    with pytest.raises(ConfigError, match="is in block 0, but the probe has entered block 1"):
        llama.probe.measure({later: weight, name: weight})
    with pytest.raises(ConfigError, match="no block 2 among 2"):
        llama.probe.enter(2)
    with pytest.raises(TextError, match="windows have shape"):
        KlProbe(llama.model, llama.layout, TOKENS[0], batch_size=2, device="cpu")


@pytest.mark.parametrize(
    ("changed", "computed"),
    [
        ("mlp.down_proj", ["mlp.down_proj"]),
        ("mlp.gate_proj", ["mlp.gate_proj", "mlp.down_proj"]),
        ("self_attn.o_proj", ["self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]),
        ("self_attn.v_proj", ["self_attn.v_proj", "self_attn.o_proj"]),
    ],
)
def test_only_what_depends_on_a_layer_is_computed(
    changed: str, computed: list[str], llama: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = llama.layout.blocks[1]
    names = {module: name for name, module in llama.model.named_modules()}
    ran: list[str] = []
    original = nn.Linear.forward

    def forward(module: nn.Linear, x: Tensor) -> Tensor:
        ran.append(names[module])
        return original(module, x)

    llama.probe.enter(1)
    monkeypatch.setattr(nn.Linear, "forward", forward)
    llama.probe.measure({f"{path}.{changed}": llama.other(f"{path}.{changed}")})
    inside = list(dict.fromkeys(name[len(path) + 1 :] for name in ran if name.startswith(path)))
    assert inside[: len(computed)] == computed
    assert all(name.startswith((path, "lm_head")) for name in ran)


class Careless(nn.Module):
    """A block that changes what its modules returned, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.middle, self.last = (nn.Linear(4, 4, bias=False) for _ in range(3))

    def forward(self, hidden: Tensor) -> Tensor:
        out = self.before(hidden)
        residual = out.view(-1, 4)
        out = self.middle(out)
        residual += 1
        out = self.last(out)
        out *= 2
        return out.view(-1, 4) + residual


@torch.no_grad()
def test_outputs_changed_in_place_are_computed_again() -> None:
    torch.manual_seed(0)
    block = Careless()
    layers = {"middle": block.middle, "last": block.last}
    hidden = torch.randn(3, 4)
    output, memo = record_block(block, layers, (hidden,), {})
    assert torch.equal(output, block(hidden))

    for name, module in layers.items():
        dense, module.weight = module.weight, nn.Parameter(module.weight + 1)
        expected = block(hidden)
        for _ in range(2):
            with memo.replay([name]):
                assert torch.equal(block(hidden), expected)
        module.weight = dense


def test_no_more_is_kept_than_the_docstring_says(llama: Case) -> None:
    config = llama.model.config
    most = TOKENS.numel() * (8 * config.hidden_size + 4 * config.intermediate_size) * 4

    for block in (0, 1):
        llama.probe.enter(block)
        storages: dict[int, int] = {}
        for state in llama.probe._states:
            outputs = [kept.output for kept in state.memo.kept]
            inputs = [tail.input for tail in state.memo.tails.values()]
            for tensor in tensors_in([state.hidden, state.after, outputs, inputs]):
                storages[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        assert 0 < sum(storages.values()) <= most
