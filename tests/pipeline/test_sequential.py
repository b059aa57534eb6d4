"""The sequential mode measures what the compressed model reads, and its keys form a chain."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress_core.hf.loading import load_model
from compress_core.methods import METHODS, build_method
from compress_core.stats import InputStats, PrefixStats, buckets_of
from tasks.stages.arrays import Stored, get_tensor
from tests.pipeline import pico

LAST = pico.BLOCKS - 1
STEPS = ["layer", "block"]
TAPS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
STATISTICS = {"tokenise", "collect", "weigh", "decompose"}


@pytest.fixture(scope="module")
def saes(
    inputs: pico.Inputs, cold_walk: pico.Walk, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, pico.Walk]:
    """SAES-SVD by layer and by block, in one home that has the statistics already."""
    home = tmp_path_factory.mktemp("saes") / "home"
    shutil.copytree(cold_walk.session.store.root, home / "store")
    settings = inputs.settings(home)
    return {step: pico.walk({**settings, "method": f"saes_svd:prefix={step}"}) for step in STEPS}


@pytest.fixture
def saes_home(saes: dict[str, pico.Walk], home: Path) -> Path:
    """Their home, free to be changed."""
    shutil.copytree(saes["layer"].session.store.root, home / "store")
    return home


def inputs_of(model: Any, block: int, tokens: Tensor) -> dict[str, Tensor]:
    """What every tap of a block reads, (samples, length, in)."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, args: Any) -> None:
            seen[name] = args[0].detach().double()

        return hook

    handles = [
        model.get_submodule(f"model.layers.{block}.{tap}").register_forward_pre_hook(keep(tap))
        for tap in TAPS
    ]
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def measured(walk: pico.Walk, block: int, tap: str) -> PrefixStats:
    name = f"model.layers.{block}.{tap}"
    unit = next(u for u in walk.session.manifests if (u.stage, u.name) == ("measure", name))
    return PrefixStats.unpack(Stored(walk.session.artifact(unit)))


def tokens_of(walk: pico.Walk) -> Tensor:
    unit = next(u for u in walk.session.manifests if u.name == "calibration")
    return get_tensor(walk.session.artifact(unit), "tokens")


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("block", range(pico.BLOCKS))
@pytest.mark.parametrize("step", STEPS)
def test_it_is_what_the_final_model_reads(
    step: str, block: int, saes: dict[str, pico.Walk], inputs: pico.Inputs
) -> None:
    """By block, the block's own layers are still dense while its inputs are measured."""
    walk = saes[step]
    dense, small = load_model(inputs.model), load_model(walk.folder)
    tokens = tokens_of(walk)
    if step == "block":
        small.model.layers[block] = dense.model.layers[block]
    of_dense, of_small = inputs_of(dense, block, tokens), inputs_of(small, block, tokens)
    for tap in TAPS:
        before, after = (x.reshape(-1, x.shape[-1]) for x in (of_dense[tap], of_small[tap]))
        stats = measured(walk, block, tap)
        assert stats.tokens == len(after) == tokens.numel()
        assert distance(stats.gram, after.T @ after) < 1e-5
        assert distance(stats.cross, before.T @ after) < 1e-5
        same = block == 0 and (step == "block" or tap == TAPS[0])
        assert (distance(stats.gram, before.T @ before) < 1e-5) == same
        assert (distance(stats.cross, after.T @ after) < 1e-5) == same
        if not same:  # rows of the cross statistics are the dense model's
            assert distance(stats.cross.T, before.T @ after) > 1e-3


def test_where_nothing_is_compressed_yet_it_is_the_dense_models(
    saes: dict[str, pico.Walk],
) -> None:
    walk = saes["block"]
    for tap in TAPS:
        unit = next(
            u
            for u in walk.session.manifests
            if (u.stage, u.name) == ("collect", f"model.layers.0.{tap}")
        )
        dense, found = (
            InputStats.unpack(Stored(walk.session.artifact(unit))),
            measured(walk, 0, tap),
        )
        torch.testing.assert_close(found.gram, dense.gram, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.cross, dense.gram, rtol=1e-12, atol=1e-12)


def test_stack_of_batch_is_the_statistics_of_bucket_means(
    inputs: pico.Inputs, saes_home: Path
) -> None:
    walk = pico.walk(inputs.settings(saes_home, method="ada_svd:buckets=4"))
    tokens = tokens_of(walk)
    buckets = torch.tensor(buckets_of(len(tokens), 4, 3))
    assert buckets.bincount().tolist() == [3, 3, 3, 3]
    dense, small = load_model(inputs.model), load_model(walk.folder)
    of_dense, of_small = inputs_of(dense, LAST, tokens), inputs_of(small, LAST, tokens)
    for tap in TAPS:
        before, after = (
            torch.stack([x[tap][buckets == b].mean(dim=0) for b in range(4)]).flatten(0, 1)
            for x in (of_dense, of_small)
        )
        stats = measured(walk, LAST, tap)
        assert stats.tokens == len(after) == 4 * tokens.shape[1]
        assert distance(stats.gram, after.T @ after) < 1e-5
        assert distance(stats.cross, before.T @ after) < 1e-5


def test_what_advance_notes_is_the_error_of_the_hidden_states(
    saes: dict[str, pico.Walk], inputs: pico.Inputs
) -> None:
    walk = saes["layer"]
    models = [load_model(folder).model for folder in (inputs.model, walk.folder)]
    seen: list[Tensor] = []
    for model in models:
        for layer in model.layers:
            layer.register_forward_hook(
                lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)
            )
        with torch.no_grad():
            model(input_ids=tokens_of(walk), use_cache=False)
    units = [unit for unit in walk.session.manifests if unit.stage == "advance"]
    for block, unit in enumerate(units):
        before, after = seen[block].double(), seen[pico.BLOCKS + block].double()
        expected = float((after - before).square().sum() / before.square().sum())
        assert walk.session.artifact(unit).attrs["error"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_that_does_not_ask_never_pays(
    method: str, inputs: pico.Inputs, home: Path
) -> None:
    name = f"{method}:group=3" if method == "basis_sharing" else method
    pipeline, _, _ = pico.build(inputs.settings(home, method=name))
    stages = {group.stage for group in pipeline.groups}
    asks = (
        method in ("ada_svd", "saes_svd", "press", "gptq", "caldera") or build_method(name).prunes
    )
    assert build_method(name).sequential == asks
    assert ({"measure", "advance"} <= stages) == asks
    assert asks or not {"measure", "advance"} & stages
    updated = {"svd_llm": "update=u", "basis_sharing": "group=3:update=u"}
    if method in updated:
        more, _, _ = pico.build(inputs.settings(home, method=f"{method}:{updated[method]}"))
        assert {"measure", "advance"} <= {group.stage for group in more.groups}


@pytest.mark.parametrize("step", STEPS)
def test_again_nothing_is_computed_or_left(
    step: str, saes: dict[str, pico.Walk], inputs: pico.Inputs, saes_home: Path
) -> None:
    before = pico.tree(saes_home / "store")
    again = pico.walk(inputs.settings(saes_home, method=f"saes_svd:prefix={step}"))
    assert again.computed == {}
    assert again.digests == saes[step].digests
    assert pico.tree(saes_home / "store") == before
    assert pico.scratch_left(saes_home / "store") == []


def test_the_statistics_of_the_dense_model_are_shared(saes: dict[str, pico.Walk]) -> None:
    """With svd_llm, whose home this is; by block only what the block's own layers decide is new."""
    for step in STEPS:
        assert not STATISTICS & set(saes[step].computed)
    both = {step: saes[step].keys for step in STEPS}
    first = ("measure", f"model.layers.0.{TAPS[0]}")
    assert both["layer"][first] == both["block"][first]
    assert saes["block"].computed["measure"] == saes["block"].names("measure") - {first[1]}


@pytest.mark.parametrize("step", STEPS)
def test_another_budget_changes_every_key_behind_the_first_compressed_layer(
    step: str, saes: dict[str, pico.Walk], inputs: pico.Inputs, saes_home: Path
) -> None:
    method = f"saes_svd:prefix={step}"
    found = pico.walk(inputs.settings(saes_home, method=method, kept=0.5))
    assert not STATISTICS & set(found.computed)
    untouched = {f"model.layers.0.{tap}" for tap in (TAPS if step == "block" else TAPS[:1])}
    assert found.computed["measure"] == found.names("measure") - untouched
    assert found.computed["advance"] == found.names("advance")
    assert found.computed["realise"] == found.names("realise")
    changed = {name for name, key in found.keys.items() if saes[step].keys[name] != key}
    assert {unit for stage, unit in changed if stage == "measure"} == found.computed["measure"]


def test_a_weight_changes_what_comes_after_it_and_nothing_before(
    saes: dict[str, pico.Walk], inputs: pico.Inputs, saes_home: Path, tmp_path: Path
) -> None:
    changed = pico.copy_inputs(inputs, tmp_path / "changed")
    layer = "model.layers.1.mlp.up_proj"
    pico.change_weight(changed.model, f"{layer}.weight", lambda weight: weight * 1.5)
    found = pico.walk(changed.settings(saes_home, method="saes_svd"))
    blocks = {int(unit.split(".")[2]) for unit in found.computed["measure"]}
    assert blocks == {int(unit.split(".")[2]) for unit in found.computed["advance"]} == {1, 2}
    later = {name for name in found.names("realise") if name.startswith("model.layers.2.")}
    # what up_proj does not reach was measured again and found to be the same
    assert found.computed["realise"] == later | {layer, "model.layers.1.mlp.down_proj"}
    fresh = pico.walk(changed.settings(tmp_path / "fresh", method="saes_svd"))
    assert fresh.digests == found.digests


def test_what_shuffles_the_buckets_is_in_the_key(inputs: pico.Inputs, home: Path) -> None:
    def settings_of(method: str, **more: Any) -> dict[str, Any]:
        pipeline, _, _ = pico.build(inputs.settings(home, method=method, **more))
        unit = next(u for group in pipeline.groups if group.stage == "measure" for u in group.units)
        return unit.settings

    stacked = settings_of("ada_svd:buckets=7")
    assert (stacked["seed"], stacked["buckets"]) == (3, 7)
    assert settings_of("ada_svd:buckets=7", seed=4) == stacked | {"seed": 4}
    assert settings_of("ada_svd:buckets=5") == stacked | {"buckets": 5}
    exact = settings_of("ada_svd:calibration=streaming")
    assert exact == settings_of("saes_svd", seed=4)
    assert not {"seed", "buckets"} & set(exact)


def test_batch_size_changes_rounding_only(
    inputs: pico.Inputs, saes: dict[str, pico.Walk], home: Path
) -> None:
    """A batch that the windows are no multiple of; its size is in no key, so the home is empty."""
    found = pico.walk(inputs.settings(home, method="saes_svd", batch_size=5))
    assert found.metrics()["perplexity"] == pytest.approx(
        saes["layer"].metrics()["perplexity"], 1e-3
    )
    tap = TAPS[-1]
    assert distance(measured(found, 1, tap).gram, measured(saes["layer"], 1, tap).gram) < 1e-3
