"""Recovery betters what is stored, never worsens it, and can stop anywhere."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from compress_core.errors import ConfigError, NumericsError
from compress_core.hf.checkpoint import Checkpoint
from compress_core.hf.layout import inspect_model
from compress_core.hf.loading import load_model
from compress_core.learn.loop import NoCheckpoints, Training
from compress_core.learn.teacher import Teacher, teach
from compress_core.recover.loss import Objective
from compress_core.recover.parts import LowRankUpdate, Stored, Whole, stored_tensors
from compress_core.recover.recovery import Recovered, recover
from compress_core.recover.settings import (
    LADDER,
    How,
    Recovery,
    best_trial,
    next_trial,
)
from compress_core.recover.windows import split_windows
from compress_core.types import ModelLayout
from tests.families import tiny_model, token_batch
from tests.pipeline.contents import coded_layers, sparse_layers, varied_layers
from tests.pipeline.folders import make_pair

HOWS: list[How] = ["factors", "lora"]


class Case:
    """A compressed model, the dense one's predictions, and windows."""

    def __init__(self, folder: Path, layers: Any = None, dtype: torch.dtype = torch.float32):
        dense = tiny_model("llama", dtype=dtype)
        self.pair = make_pair(dense, folder, layers=layers)
        self.layout: ModelLayout = inspect_model(Checkpoint(self.pair.dense))
        self.windows = token_batch(rows=24, length=16)
        self.teacher = teach(dense, self.windows, 32, batch_size=8, device="cpu")
        self.recovery = Recovery("factors", steps=40, batch=4, rank=2)

    def model(self) -> Any:
        return load_model(self.pair.small)

    def run(self, checkpoints: Any = None, model: Any = None, **changes: Any) -> Recovered:
        training = Training(self.windows, "cpu", 4, 0, checkpoints or NoCheckpoints())
        recovery = replace(self.recovery, **changes)
        return recover(model or self.model(), self.layout, recovery, self.teacher, training)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("plain"))


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {stored.name: stored.tensor.detach().clone() for stored in stored_tensors(model)}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("how", HOWS)
def test_it_comes_nearer_to_the_dense_model_and_nothing_else_moves(case: Case, how: How) -> None:
    model = case.model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = case.run(model=model, how=how)
    assert found.report["best"] < 0.95 * found.report["start"]
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed <= set(found.tensors)
    assert changed
    assert same({name: after[name] for name in found.tensors}, found.tensors)
    watched = found.curves["held_back"]
    assert float(watched[~watched.isnan()].min()) == found.report["best"]


@pytest.mark.parametrize("how", HOWS)
def test_a_start_that_cannot_be_bettered_comes_back_bit_for_bit(case: Case, how: How) -> None:
    model = case.model()
    with torch.no_grad():
        for stored in stored_tensors(model):
            stored.tensor.view(-1)[0] = -0.0
    before = tensors_of(model)
    own = teach(model, case.windows, 96, batch_size=8, device="cpu")
    case = copy.copy(case)
    case.teacher = own
    found = case.run(model=model, how=how, text=0.0)
    assert same(found.tensors, before)
    zeros = [tensor.view(-1)[0] for tensor in found.tensors.values()]
    assert all(bool(zero.signbit()) for zero in zeros)


@pytest.mark.parametrize("layers", [varied_layers, sparse_layers])
@pytest.mark.parametrize("how", HOWS)
def test_columns_sparse_values_and_shared_factors_train_too(
    how: How, layers: Callable[..., Any], tmp_path: Path
) -> None:
    case = Case(tmp_path, layers)
    model = case.model()
    before = tensors_of(model)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    found = case.run(model=model, how=how)
    assert found.report["best"] < found.report["start"]
    changed = {name for name in before if not torch.equal(before[name], found.tensors[name])}
    parts = [{name.rpartition(".")[2] for name in names} for names in (before, changed)]
    special = parts[0] - {"weight", "factor_in"}
    assert special
    assert special <= parts[1]
    assert same(buffers, dict(model.named_buffers()))
    factors = {
        id(module.factor_in)
        for module in model.modules()
        if hasattr(module, "factor_in") and module.factor_in.numel()
    }
    assert len(factors) == sum(name.endswith("factor_in") for name in before)


def test_of_codes_the_scales_are_trained_and_nothing_is_merged_into_them(tmp_path: Path) -> None:
    case = Case(tmp_path, coded_layers)
    model = case.model()
    before = tensors_of(model)
    codes = {name: buffer.clone() for name, buffer in model.named_buffers()}
    found = case.run(model=model)
    assert found.report["best"] < found.report["start"]
    changed = {name for name in before if not torch.equal(before[name], found.tensors[name])}
    assert {"base", "weight", "sparse_values"} <= {name.rpartition(".")[2] for name in changed}
    assert same(codes, dict(model.named_buffers()))
    with pytest.raises(ConfigError, match=r"q_proj holds numbers in codes, which .* by factors"):
        case.run(model=model, how="lora")


def test_what_is_measured_is_what_is_stored(tmp_path: Path) -> None:
    case = Case(tmp_path, dtype=torch.bfloat16)
    model = case.model()
    found = case.run(model=model)
    assert {tensor.dtype for tensor in found.tensors.values()} == {torch.bfloat16}
    _, held = split_windows(case.windows, case.recovery.held_back, case.recovery.seed)
    training = Training(case.windows, "cpu", 4, 0)
    objective = Objective(model, case.layout, case.teacher, training, case.recovery.text, 4)
    assert objective.mean(held) == found.report["best"] < found.report["start"]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("masked", [False, True])
def test_a_merged_update_is_the_update_beside_the_tensor(how: How, masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(6, 5, generator=generator)
    mask = torch.rand(6, 5, generator=generator) < 0.5 if masked else None
    tensor = nn.Parameter(dense if mask is None else dense[mask])
    stored = Stored("layer", "weight", tensor, mask)
    part = LowRankUpdate(stored, 2, generator) if how == "lora" else Whole(stored)
    for leaf in part.leaves:
        leaf += 0.1 * torch.randn(leaf.shape, generator=generator)
    inputs = torch.randn(7, 5, generator=generator)
    leaves = [leaf.clone().requires_grad_() for leaf in part.leaves]
    update = leaves[0]
    if isinstance(part, LowRankUpdate):
        product = part.size * leaves[0] @ leaves[1]
        update = part.start + (product if mask is None else product[mask])
    weight = update if mask is None else torch.zeros(6, 5).masked_scatter(mask, update)
    outputs = inputs @ weight.T
    outputs.square().sum().backward()
    part.put()
    merged: Tensor = tensor if mask is None else torch.zeros(6, 5).masked_scatter(mask, tensor)
    torch.testing.assert_close(inputs @ merged.T, outputs)
    (inputs @ merged.T).square().sum().backward()
    part.pull(1.0)
    assert tensor.grad is None
    for leaf, expected in zip(part.leaves, leaves, strict=True):
        torch.testing.assert_close(leaf.grad, expected.grad)


class Breaking:
    """Checkpoints in memory; the process "dies" as one is saved."""

    def __init__(self, dies_at: int) -> None:
        self.dies_at, self.saves = dies_at, 0
        self.kept: dict[str, Tensor] | None = None

    def load(self) -> Any:
        return self.kept

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        self.kept = {name: tensor.clone() for name, tensor in tensors.items()}
        self.saves += 1
        if self.saves == self.dies_at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("dies_at", [1, 6, 11, 15])
def test_interrupted_anywhere_it_ends_the_same(case: Case, how: How, dies_at: int) -> None:
    straight = case.run(how=how)
    checkpoints = Breaking(dies_at)
    with pytest.raises(KeyboardInterrupt):
        case.run(checkpoints, how=how)
    again = case.run(checkpoints, how=how)
    assert same(straight.tensors, again.tensors)
    assert straight.report == again.report
    assert all(
        torch.equal(curve.nan_to_num(), again.curves[name].nan_to_num())
        for name, curve in straight.curves.items()
    )


def test_a_loss_that_is_not_finite_names_step_and_layer(case: Case) -> None:
    model = case.model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    with pytest.raises(NumericsError, match=r"at step 0; .* layer model\.layers\.1\.mlp\.up_proj"):
        case.run(model=model)


def test_a_loss_that_becomes_so_keeps_the_last_checkpoint(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    recovery, divergence = case.recovery, Teacher.divergence
    broken = recovery.search + 7
    checkpoints = Breaking(0)

    def breaks(teacher: Teacher, logits: Tensor, rows: slice) -> Tensor:
        late = checkpoints.kept is not None and int(checkpoints.kept["step"]) >= broken - 5
        return divergence(teacher, logits, rows) * (torch.nan if late else 1)

    monkeypatch.setattr(Teacher, "divergence", breaks)
    with pytest.raises(NumericsError, match="the loss itself, no layer") as error:
        case.run(checkpoints)
    assert checkpoints.kept is not None
    assert f"at step {int(checkpoints.kept['step'])};" in str(error.value)


@pytest.mark.parametrize("how", HOWS)
def test_as_many_windows_are_watched_as_a_plan_counts(
    case: Case, how: How, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched: list[int] = []
    mean = Objective.mean

    def counted(self: Objective, picks: Tensor, step: int | None = None) -> float:
        watched.append(len(picks))
        return mean(self, picks, step)

    monkeypatch.setattr(Objective, "mean", counted)
    case.run(how=how)
    most = replace(case.recovery, how=how).watched(len(case.windows))
    spared = case.recovery.sides * len(LADDER) * max(watched)  # trials beside the best are enough
    assert most - 2 * spared < sum(watched) <= most


def test_what_overlaps_a_held_back_window_is_not_trained_on() -> None:
    starts = [0, 500, 150, 530, 300, 1700]
    windows = torch.stack([torch.arange(i, i + 100) for i in starts])
    for seed in range(20):
        trained, held = (found.tolist() for found in split_windows(windows, 0.25, seed))
        assert len(held) == 2
        lost = {4 - i for i in held if i in (1, 3)}  # windows 1 and 3 have 70 tokens in common
        assert set(trained) == set(range(6)) - set(held) - lost


def test_what_texts_have_in_common_is_no_overlap() -> None:
    """The same words before every text, within windows and at their beginning."""
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(1000, (40, 200), generator=generator)
    windows[:, 40:100] = torch.arange(60)
    windows[5:10, :60] = torch.arange(60)
    trained, held = split_windows(windows, 0.25, 0)
    assert len(held) == 10 and len(trained) == 30


def test_overlaps_are_found_behind_a_token_that_begins_every_window() -> None:
    windows = torch.stack([torch.arange(i, i + 100) for i in (500, 900, 550, 1700, 2500, 3000)])
    windows[:, 0] = 1
    for seed in range(20):
        trained, held = (found.tolist() for found in split_windows(windows, 0.25, seed))
        lost = {2 - i for i in held if i in (0, 2)}
        assert set(trained) == set(range(6)) - set(held) - lost


def test_fewer_are_held_back_of_a_short_text() -> None:
    windows = torch.stack([torch.arange(i, i + 100) for i in range(0, 1600, 50)])
    trained, held = (found.tolist() for found in split_windows(windows, 0.5, 0))
    assert 2 <= len(held) < 16
    assert 2 * len(trained) >= 32 - len(held)
    assert all(abs(one - other) > 1 for one in trained for other in held)


def test_too_few_windows_are_refused_before_anything_is_done(case: Case) -> None:
    with pytest.raises(ConfigError, match="holds 2 of 3 calibration windows back"):
        Recovery("factors").check(3)
    Recovery("factors").check(4)
    with pytest.raises(ConfigError, match="overlap the 2 that recovery holds back"):
        split_windows(torch.arange(64).repeat(8, 1), 0.125, 0)


@given(
    top=st.integers(0, len(LADDER) - 1),
    heights=st.lists(st.floats(0.1, 2.0), min_size=len(LADDER), max_size=len(LADDER)),
)
def test_the_search_finds_the_bottom_of_any_valley(top: int, heights: list[float]) -> None:
    slope = torch.tensor(heights, dtype=torch.float64)
    valley = torch.zeros(len(LADDER), dtype=torch.float64)
    for i in range(top + 1, len(LADDER)):
        valley[i] = valley[i - 1] + slope[i]
    for i in range(top - 1, -1, -1):
        valley[i] = valley[i + 1] + slope[i]
    losses = torch.full((len(LADDER),), torch.nan, dtype=torch.float64)
    while (rung := next_trial(losses)) is not None:
        losses[rung] = valley[rung]
    assert best_trial(losses) == top
