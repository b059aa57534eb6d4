"""Promotions of real folders: the smoke test, what is measured again; races, kill -9."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.runs.promotion import Asked, promote, roll_back
from flows.settings.gates import build_gates
from tasks.promotion.moves import DONE
from tasks.tracking.speaking import TrackingError
from tests.patience import PATIENCE
from tests.pipeline import pico

Run = Callable[..., Any]


def test_races_have_one_winner_and_a_killed_promotion_is_healed(blank_home: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.pipeline.racing", "3", "--one", "--blank", str(blank_home)],
        cwd=pico.ROOT,
        env=pico.clean_environment(PYTHONPATH=str(pico.ROOT)),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert "3 races, 3 winners" in done.stdout
    # killed before it recorded a move, the next makes it; after that it is withdrawn or finished
    assert f"{['done'] * 3 + ['withdrawn'] + ['done'] * 3}" in done.stdout


@pytest.fixture(scope="module")
def promoted(run: Run, inputs: pico.Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with two versions of a pico model, measured on different windows."""
    home = tmp_path_factory.mktemp("promoted") / "home"
    settings = inputs.settings(home, method="svd", name="pico")
    settings |= {"calibration": None}
    run(settings)
    run(settings | {"eval_windows": 4, "kept": 0.9})
    return home


def asked(home: Path, gates: dict[str, Any], **changes: Any) -> Asked:
    return Asked(home, "pico", build_gates(gates, "of a test"), **changes)


def test_a_real_model_is_held_against_its_gates_and_measured_like_the_champion(
    promoted: Path, server_environment: dict[str, str]
) -> None:
    told: list[str] = []
    with pico.environment(server_environment):
        gates = {
            "perplexity": {"worse_than_dense": "900%"},
            "generation": {"prompts": ["aei"], "new_tokens": 16, "max_repetition": 1},
        }
        first = promote(asked(promoted, gates, version="1"), told.append)
        assert (first["moved"], first["passed"], first["champion"]) == (True, True, None)
        names = [gate["metric"] for gate in first["gates"]]
        smoke = ["not_finite", "empty", "repetition"]
        assert names == ["perplexity", *(f"generation/{name}" for name in smoke)]

        against: dict[str, Any]
        against = {name: {"worse_than_champion": "0%"} for name in ("perplexity", "kl", "memory")}
        second = promote(asked(promoted, against), told.append)
        verdicts = {gate["metric"]: gate for gate in second["gates"]}
        assert not second["moved"]
        for name in ("perplexity", "kl"):
            assert "not measured on these windows" in verdicts[name]["why"]
        assert (verdicts["memory"]["passed"], verdicts["memory"]["why"]) == (False, "")
        assert told == []

        against = {"perplexity": {"worse_than_champion": "10%"}, "kl": {"worse_than_champion": 0}}
        third = promote(asked(promoted, against, measure=True), told.append)
        assert told == ["measuring version 1 on the texts and tasks of version 2"]
        assert third["moved"], third["gates"]  # kept 0.9 is nearer to the dense model than 0.6
        config = (promoted / "models").glob("*0.6*/eigenpress.yaml")
        again = _windows_of(next(config).parent, 4)
        assert third["gates"][0]["limit"] == pytest.approx(1.1 * again)
        assert roll_back(promoted, "pico")["version"] == 1


def test_the_best_is_one_that_was_measured_like_the_champion(
    promoted: Path, server_environment: dict[str, str]
) -> None:
    from flows.runs.candidates import choose_version
    from tasks.tracking.registered_model import versions_of

    with pico.environment(server_environment):
        versions = versions_of(promoted, "pico")
        for champion in versions:  # on other windows than the other one
            best = choose_version(promoted, "best:perplexity", versions, champion)
            assert best == champion
        sizes = {v.version: json.loads(v.tags["bytes"])["compressed"] for v in versions}
        best = choose_version(promoted, "best:bytes", versions, versions[1])
        assert best.version == min(sizes, key=lambda number: sizes[number])


def _windows_of(folder: Path, windows: int) -> float:
    """Perplexity of a folder on the first windows of its own evaluation text."""
    import yaml

    from compress_core.hf.documents import read_documents
    from compress_core.hf.loading import load_model
    from compress_core.hf.text import evaluation_windows, load_tokenizer
    from tests.whole import perplexity_and_kl

    config = yaml.safe_load((folder / "eigenpress.yaml").read_text())
    tokenizer = load_tokenizer(folder)
    texts = read_documents(config["eval_text"][0], None, tokenizer=tokenizer).texts
    tokens = evaluation_windows(texts, tokenizer, length=config["length"], windows=windows)
    return perplexity_and_kl(load_model(folder), tokens).perplexity


def test_broken_weights_fail_the_smoke_test(promoted: Path, tmp_path: Path) -> None:
    from compress_core.hf.smoke import smoke_test

    folder = tmp_path / "broken"
    shutil.copytree(next((promoted / "models").iterdir()), folder)
    for file in folder.glob("model*.safetensors"):
        _break(file)
    (one,) = smoke_test(folder, ["aei"], new_tokens=8)
    assert not one.finite


def _break(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if tensors[name].is_floating_point())
    tensors[name] = tensors[name] * float("nan")
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})


def test_altered_weights_move_nothing(promoted: Path, server_environment: dict[str, str]) -> None:
    folder = next((promoted / "models").glob("*0.9*"))
    config = folder / "config.json"
    before = config.read_text()
    config.write_text(json.dumps(json.loads(before) | {"odd": 1}))
    try:
        with (
            pico.environment(server_environment),
            pytest.raises(TrackingError, match=r"config\.json"),
        ):
            promote(asked(promoted, {"kl": {"max": 9}}))
    finally:
        config.write_text(before)


def test_the_same_as_prefect_flows(promoted: Path, server_environment: dict[str, str]) -> None:
    from flows.runs.promote import GatesFailedError, promote_flow, rollback_flow
    from flows.runs.promotion import history
    from flows.server import runtime

    with pico.environment(server_environment), runtime.flow_settings():
        with pytest.raises(GatesFailedError, match=r"does not keep its gates \(kl\)"):
            promote_flow("pico", gates={"kl": {"max": 0}}, home=promoted)
        promote_flow("pico", version="1", gates={"kl": {"max": 99}}, home=promoted)
        moved = promote_flow("pico", gates={"kl": {"max": 99}}, why="nightly", home=promoted)
        assert (moved["moved"], moved["version"]) == (True, 2)
        assert rollback_flow("pico", home=promoted)["version"] == 1
        last = history(promoted, "pico")[-2:]
    assert [(one.move.kind, one.move.why, one.ending) for one in last] == [
        ("promote", "nightly", DONE),
        ("rollback", "", DONE),
    ]


def test_store_gc_keeps_what_a_champion_holds_whichever_registry_it_asks(
    promoted: Path, blank_home: Path, server_environment: dict[str, str]
) -> None:
    from flows.runs.free import free_store
    from storage.store import Store

    other = f"sqlite:///{blank_home / 'mlflow.db'}"
    for more in ({}, {"MLFLOW_TRACKING_URI": other}):
        with pico.environment(server_environment | more):
            store = Store(promoted / "store", on_problem=pytest.fail)
            before = len(list(store.layout.artifacts()))
            report = free_store(promoted, store, 0, dry_run=True)
        assert (report.removed, report.kept) == ([], before), more
