"""SoCo from text to folder: what is trained again and what is reused, and a run that is stopped."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from compress_core.errors import CompressError
from compress_core.hf.loading import load_model
from compress_core.learn.teacher import Teacher
from tasks.stages.teacher import StoredCheckpoints
from tests.pipeline import pico

_divergence = Teacher.divergence
SHORT = "soco:phase1=12:phase2=8:phase3=4:rate=0.2"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("soco") / "home"


@pytest.fixture(scope="module")
def first(inputs: pico.Inputs, home: Path) -> pico.Walk:
    return pico.walk(inputs.settings(home, method=SHORT))


def test_the_folder_has_what_was_learned_and_keeps_the_budget(first: pico.Walk) -> None:
    layers = first.pipeline.job.model.layout.layers
    dense = sum(layer.dense_cost for layer in layers)
    numbers = first.session.artifact(first.pipeline.folder).attrs["compressible"]
    assert 0.6 * dense - max(x.atom_cost for x in layers) < numbers <= 0.6 * dense
    model = load_model(first.folder)
    stored = {
        name: first.session.artifact(unit).attrs["rank"]
        for name, unit in first.pipeline.realised.items()
    }
    for name, rank in stored.items():
        module = model.get_submodule(name)
        assert (module.weight.shape[1] if rank is None else module.entry["rank"]) >= 1
        assert (module.bias is not None) == (rank is not None)  # this model has none of its own


def test_curves_and_a_report_are_kept(first: pico.Walk) -> None:
    (curves,) = [u for u in first.session.manifests if (u.stage, u.name) == ("learn", "curves")]
    artifact = first.session.artifact(curves)
    assert {"kl", "kept", "phase"} <= set(artifact.names)
    assert len(artifact.array("kl")) == 24
    assert 0 < artifact.attrs["report"]["overlap with sigma order"] <= 1


def test_another_budget_reuses_decompositions_and_the_teacher(
    inputs: pico.Inputs, home: Path, first: pico.Walk
) -> None:
    again = pico.walk(inputs.settings(home, method=SHORT, kept=0.5))
    assert set(again.computed) == {"learn", "realise", "materialise", "evaluate"}


def test_another_seed_only_trains_again(inputs: pico.Inputs, home: Path, first: pico.Walk) -> None:
    changed = pico.walk(inputs.settings(home, method=SHORT, learn_seed=7))
    assert set(changed.computed) == {"learn", "realise", "materialise", "evaluate"}


def test_the_same_command_again_computes_nothing(
    inputs: pico.Inputs, home: Path, first: pico.Walk
) -> None:
    assert pico.walk(inputs.settings(home, method=SHORT)).computed == {}


def test_a_stopped_training_goes_on_from_its_checkpoint_to_the_same_bytes(
    inputs: pico.Inputs, tmp_path: Path, first: pico.Walk, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, saved = StoredCheckpoints.save, []

    def stopping(self: StoredCheckpoints, step: int, tensors: Any) -> None:
        save(self, step, tensors)
        saved.append(step)
        if len(saved) == 4:
            raise KeyboardInterrupt

    settings = inputs.settings(tmp_path / "home", method=SHORT)
    shutil.copytree(first.session.store.root, tmp_path / "home" / "store")
    for stage in ("learn", "realise", "materialise", "evaluate"):
        shutil.rmtree(tmp_path / "home" / "store" / stage)
    monkeypatch.setattr(StoredCheckpoints, "save", stopping)
    with pytest.raises(KeyboardInterrupt):
        pico.walk(settings)
    assert len(pico.scratch_left(tmp_path / "home" / "store")) == 1  # the latest alone
    again = pico.walk(settings)
    assert saved[4] > saved[3]  # it did not begin again
    assert again.digests == first.digests
    assert pico.scratch_left(tmp_path / "home" / "store") == []


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(
    inputs: pico.Inputs, tmp_path: Path, first: pico.Walk, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(first.session.store.root, tmp_path / "home" / "store")
    shutil.rmtree(tmp_path / "home" / "store" / "learn")
    divergence = Teacher.divergence
    steps = iter(range(100))

    def broken(self: Any, logits: torch.Tensor, rows: slice) -> torch.Tensor:
        return divergence(self, logits, rows) * (torch.nan if next(steps) == 9 else 1)

    monkeypatch.setattr(Teacher, "divergence", broken)
    with pytest.raises(CompressError, match=r"stage learn, soco: .*not finite at step 9"):
        pico.walk(inputs.settings(tmp_path / "home", method=SHORT))
    assert len(pico.scratch_left(tmp_path / "home" / "store")) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kept": 0.01}, r"kept=0.01 cannot hold one component of each of"),
        ({"samples": 7}, r"7 calibration windows are too few"),
        ({"method": "soco:phase1=0"}, r"phase1 >= 1"),
        ({"method": "soco@hull"}, r"soco.*hull|hull.*soco"),
        ({"calibration": None}, r"needs calibration text"),
    ],
)
def test_what_cannot_be_is_refused_before_a_stage_runs(
    inputs: pico.Inputs, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CompressError, match=message):
        pico.build(inputs.settings(tmp_path / "home", **{"method": SHORT, **changes}))


def test_what_is_left_of_another_training_is_not_mixed_in(
    inputs: pico.Inputs, tmp_path: Path, first: pico.Walk, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = inputs.settings(tmp_path / "home", method=SHORT)
    shutil.copytree(first.session.store.root, tmp_path / "home" / "store")
    walk = pico.walk(settings)
    assert walk.computed == {}
    key = next(key for (stage, _), key in walk.keys.items() if stage == "learn")
    walk.session.store.remove(key)
    monkeypatch.setattr(Teacher, "divergence", lambda *given: 0 * _divergence(*given))
    with pytest.raises(CompressError, match="train all again with --refresh learn"):
        pico.walk(settings)
    again = pico.walk({**settings, "refresh": ["learn"]})
    layers = again.pipeline.job.model.layout.layers
    assert again.computed["learn"] == {layer.name for layer in layers} | {"curves"}
