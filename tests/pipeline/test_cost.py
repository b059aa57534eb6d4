"""What a run is expected to take, counted by hand for a model of known shapes."""

from pathlib import Path
from typing import Any

import pytest

from tasks.engine.cost import EXACT, MODEL, Cost
from tests.pipeline import pico

WIDTH, HEADS, INNER, VOCABULARY = 32, 16, 56, 160  # HEADS: rows of k and of v
TOKENS, LENGTH, EVALUATED = 12 * 48, 48, 5 * 48
WEIGHTS = 2 * WIDTH * WIDTH + 2 * HEADS * WIDTH + 3 * INNER * WIDTH  # of a block's layers
NORMS = 2 * WIDTH


def block(tokens: int) -> float:
    """A block's forward: its parameters, QKᵀ and the sum of values."""
    return 2.0 * tokens * (WEIGHTS + NORMS) + 4.0 * tokens * LENGTH * WIDTH


def head(tokens: int) -> float:
    """Logits of so many tokens."""
    return 2.0 * tokens * VOCABULARY * WIDTH


def costs(inputs: pico.Inputs, home: Path, **changes: Any) -> dict[tuple[str, str], Cost]:
    pipeline, _, _ = pico.build(inputs.settings(home, **changes))
    return {(unit.stage, unit.name): unit.cost for group in pipeline.groups for unit in group.units}


def test_a_block_runs_once_for_all_that_is_collected_in_it(inputs: pico.Inputs, home: Path) -> None:
    found = costs(inputs, home)
    prefix = "model.layers.1"
    names = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    taps = dict(zip(names, (WIDTH, WIDTH, WIDTH, INNER), strict=True))
    outside = VOCABULARY * WIDTH + WIDTH
    units = [found["collect", f"{prefix}.{tap}"] for tap in taps] + [found["collect", prefix]]
    assert sum(cost.products[MODEL] for cost in units) == pytest.approx(block(TOKENS))
    assert {cost.held for cost in units} == {WEIGHTS + NORMS + outside}
    for cost, features in zip(units, taps.values(), strict=False):
        assert cost.products[EXACT] == 2.0 * TOKENS * features**2
        assert cost.disk == 4 * features * (features + 1)


@pytest.mark.parametrize(("method", "metric"), [("svd_llm", True), ("svd", False), ("asvd", False)])
def test_a_decomposition_counts_its_products_and_one_eigendecomposition(
    method: str, metric: bool, inputs: pico.Inputs, home: Path
) -> None:
    found = costs(inputs, home, method=method, factors="plain")
    wide = found["decompose", "model.layers.0.mlp.down_proj"]  # (32, 56), 20 components pay
    gram = 2.0 * 32 * 56 * 56 if metric else 0
    assert wide.products == {EXACT: gram + 2.0 * 32 * 32 * 56 + 2.0 * 20 * 32 * 56}
    assert wide.eigen == 32.0**3
    tall = found["decompose", "model.layers.0.mlp.up_proj"]  # (56, 32)
    gram = 2.0 * 32**3 if metric else 0
    reduce = 2.0 * 56 * 32**2
    assert tall.products == {
        EXACT: reduce + gram + 2.0 * 32**3 + 4.0 * 56 * 32 * 20 + 2.0 * 20 * 32**2
    }
    assert tall.eigen == 32.0**3


def test_an_evaluation_counts_the_head_and_both_models(inputs: pico.Inputs, home: Path) -> None:
    found = costs(inputs, home)
    once = pico.BLOCKS * block(EVALUATED) + head(EVALUATED)
    (dense, compressed) = (cost for (stage, _), cost in found.items() if stage == "evaluate")
    assert (dense.products, dense.logits) == ({MODEL: once}, EVALUATED * VOCABULARY)
    # What left the dense model's blocks is kept.
    assert compressed.products == {MODEL: once + head(EVALUATED)}
    assert compressed.logits == 2 * EVALUATED * VOCABULARY
    numbers = WEIGHTS + NORMS + VOCABULARY * WIDTH + WIDTH  # a block, and what is outside
    assert (dense.held, compressed.held) == (numbers, 2 * numbers)
    assert (dense.disk, compressed.disk) == (4 * EVALUATED * WIDTH, 0)
    read = 4 * WIDTH + 2 * WIDTH + INNER  # by q, k, v and o; gate and up; down
    given = 2 * WIDTH + 2 * HEADS + 2 * INNER + WIDTH
    batch = 4 * EVALUATED * (read + given)  # all windows at once
    states = [4 * models * EVALUATED * WIDTH for models in (1, 2)]
    assert [dense.memory, compressed.memory] == [batch + held for held in states]


def test_a_sequential_method_runs_both_models(inputs: pico.Inputs, home: Path) -> None:
    found = costs(inputs, home, method="saes_svd:prefix=block")
    measured = found["measure", "model.layers.1.mlp.down_proj"]
    assert measured.products == {MODEL: 2 * block(TOKENS), EXACT: 4.0 * TOKENS * INNER**2}
    assert found["advance", "model.layers.1"].products == {MODEL: 2 * block(TOKENS)}


@pytest.mark.parametrize("short", [False, True])
def test_a_training_counts_what_it_watches_and_what_short_memory_runs_again(
    short: bool, inputs: pico.Inputs, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if short:
        monkeypatch.setattr("compress_core.learn.loop.CHECKPOINTED_BYTES", 0)
        monkeypatch.setattr("tasks.engine.descent.PIECE_ELEMENTS", VOCABULARY)
    found = costs(inputs, home, recover="factors", recover_steps=4)["recover", "factors"]
    steps = 7 * 2 + 4  # trials of 2 steps, and the training proper
    tokens, watched = steps * 4 * LENGTH, 2 * (1 + 7 + 4) * LENGTH  # of 12 windows 2 are watched
    once = pico.BLOCKS * block(watched) + head(watched)
    trained = (3 + short) * pico.BLOCKS * block(tokens) + (2 + short) * head(tokens)
    assert found.products == {MODEL: trained + once}
    softmaxes = 2  # of the dense model's words and of the text's
    assert found.logits == softmaxes * VOCABULARY * ((2 + short) * tokens + watched)
    assert found.whole


def test_gradients_count_a_pass_back_and_their_logits(inputs: pico.Inputs, home: Path) -> None:
    found = costs(inputs, home, method="fwsvd")
    units = [cost for (stage, name), cost in found.items() if name.startswith("gradients of")]
    assert len(units) == 7 * pico.BLOCKS
    operations = sum(cost.products[MODEL] for cost in units)
    assert operations == pytest.approx(3 * pico.BLOCKS * block(TOKENS) + 2 * head(TOKENS))
    assert sum(cost.logits for cost in units) == pytest.approx(2 * TOKENS * VOCABULARY)


def test_the_folder_is_as_large_as_its_cost_says(
    cold_walk: pico.Walk, inputs: pico.Inputs, home: Path
) -> None:
    expected = costs(inputs, home)["materialise", "model"].disk
    session, folder = cold_walk.session, cold_walk.pipeline.folder
    assert expected == pytest.approx(session.artifact(folder).attrs["bytes"], rel=0.1)
