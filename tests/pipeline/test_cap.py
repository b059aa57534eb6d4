"""CAP from the dense folder to one that loads: budget, what is reused, how a training goes on."""

import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import compress_core.hf  # noqa: F401  registers the format
from compress_core.errors import BudgetError, ConfigError
from tasks.stages.arrays import get_tensor
from tasks.stages.learn import CURVES
from tasks.stages.teacher import StoredCheckpoints
from tests.pipeline import pico
from tests.whole import perplexity_and_kl

pytestmark = pytest.mark.usefixtures("code_cache")

VARIANTS = [
    "cap",
    "cap:reading=printed:policy=group:steps=2:init=activation",
    "cap:reading=printed",
    "cap:policy=none:scale=none:lambda_scale=0.1:refit=dense",
    "cap:policy=none:scale=none:lambda_scale=0.1:refit=prefix",
]


MODELS = {  # of two blocks: nothing is as dear to decompose for
    "llama": partial(pico.llama, blocks=2),
    "gpt2": partial(pico.gpt2, blocks=2),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pico.Inputs]:
    root = tmp_path_factory.mktemp("models")
    return {name: pico.make_inputs(root / name, config=make) for name, make in MODELS.items()}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, models: dict[str, pico.Inputs]) -> pico.Inputs:
    return models[request.param]


@pytest.fixture(scope="module")
def inputs(models: dict[str, pico.Inputs]) -> pico.Inputs:
    return models["llama"]


def report_of(walk: pico.Walk) -> dict[str, Any]:
    (unit,) = [u for u in walk.session.manifests if u.stage == "learn" and u.name == CURVES]
    return dict(walk.session.artifact(unit).attrs["report"])


def test_variants_from_end_to_end(model: pico.Inputs, tmp_path: Path) -> None:
    kl = {}
    for method in VARIANTS:
        walk = pico.walk(model.settings(tmp_path, method=method, kept=0.5))
        attrs = walk.session.artifact(walk.pipeline.folder).attrs
        dense = sum(layer.dense_cost for layer in walk.pipeline.job.layers)
        largest = max(layer.atom_cost for layer in walk.pipeline.job.layers)
        assert 0.5 * dense - largest < attrs["compressible"] <= 0.5 * dense
        unit = next(u for u in walk.session.manifests if u.name.startswith("evaluation on"))
        tokens = get_tensor(walk.session.artifact(unit), "tokens")
        for trust in (False, True):
            loaded = AutoModelForCausalLM.from_pretrained(walk.folder, trust_remote_code=trust)
            found = perplexity_and_kl(loaded.eval(), tokens, reference=None, batch_size=8)
            assert found.perplexity == pytest.approx(walk.metrics()["perplexity"], rel=1e-5)
        kl[method] = walk.metrics()["kl"]
        assert 0 < kl[method] < 10
        report = report_of(walk)
        assert {"loss dense", "loss before", "loss trained", "kept"} <= report.keys()
        if method != "cap:reading=printed":
            assert report["loss after"] <= report["loss before"]
            assert report["robust PCA, residual at most"] <= 1e-6 or "printed" in method
        assert pico.scratch_left(walk.session.store.root) == []
    assert kl["cap"] < kl["cap:reading=printed"] and kl[VARIANTS[4]] < kl["cap:reading=printed"]


def test_a_second_budget_decomposes_nothing_and_a_second_seed_only_trains(
    inputs: pico.Inputs, tmp_path: Path
) -> None:
    def walk(**changes: Any) -> pico.Walk:
        return pico.walk(inputs.settings(tmp_path, **{"method": "cap", **changes}))

    first = walk(kept=0.5)
    assert {"decompose", "collect"} <= first.computed.keys()
    second = walk(kept=0.4)
    assert not {"tokenise", "collect", "decompose"} & second.computed.keys()
    assert "learn" in second.computed
    again = walk(kept=0.5)
    assert again.computed == {} and again.digests == first.digests
    assert "collect" not in walk(kept=0.5, method="cap:reading=printed").computed
    seeded = walk(kept=0.5, learn_seed=4)
    assert not {"tokenise", "collect", "decompose"} & seeded.computed.keys()
    assert "learn" in seeded.computed


class Killed(Exception):
    """Stands for a machine that goes away."""


@pytest.fixture(scope="module")
def whole(
    inputs: pico.Inputs, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], pico.Walk]:
    """A walk that nobody stopped, made once."""
    folder = tmp_path_factory.mktemp("whole")

    @cache
    def get(method: str) -> pico.Walk:
        home = folder / method.replace(":", "-")
        return pico.walk(inputs.settings(home, method=method, kept=0.5))

    return get


@pytest.mark.parametrize(("method", "step"), [("cap", 3), ("cap", 30), ("cap:reading=printed", 2)])
def test_a_training_that_was_stopped_goes_on_to_the_same_model(
    method: str,
    step: int,
    whole: Callable[[str], pico.Walk],
    inputs: pico.Inputs,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    walk = whole(method)
    shutil.copytree(walk.session.store.root, home / "store")
    for stage in ("learn", "realise", "materialise"):
        shutil.rmtree(home / "store" / stage)
    settings = inputs.settings(home, method=method, kept=0.5)
    save = StoredCheckpoints.save

    def halting(self: StoredCheckpoints, at: int, tensors: Any) -> None:
        save(self, at, tensors)
        if at == step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(StoredCheckpoints, "save", halting)
        with pytest.raises(Killed):
            pico.walk(settings)
    rest = pico.walk(settings)
    assert "decompose" not in rest.computed and "learn" in rest.computed
    for (stage, name), digest in walk.digests.items():
        if stage in ("learn", "realise"):
            assert rest.digests[stage, name] == digest, name
    assert pico.scratch_left(rest.session.store.root) == []


def test_refusals(model: pico.Inputs, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="cannot hold one component"):
        pico.build(model.settings(tmp_path, method="cap", kept=0.01))
    with pytest.raises(ConfigError, match="give --samples of at least 2"):
        pico.build(model.settings(tmp_path, method="cap", kept=0.5, samples=1))
    with pytest.raises(ConfigError, match="needs calibration text"):
        pico.build(model.settings(tmp_path, method="cap", kept=0.5, calibration=None))
