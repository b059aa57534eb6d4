"""What the tracking client promises: runs, registered folders, tags, keys, and clear errors."""

import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.tracking import client as tracking
from tasks.tracking import limits
from tasks.tracking.speaking import speaking
from tests.patience import PATIENCE


@pytest.fixture
def home(blank_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    target = tmp_path / "home"
    target.mkdir()
    shutil.copyfile(blank_home / "mlflow.db", target / "mlflow.db")
    return target


def record(home: Path, **changes: object) -> str:
    values: dict = {
        "experiment": "tests",
        "run_name": "one",
        "parameters": {"kept": 0.6},
        "metrics": {"perplexity": 7.5},
        "artifacts": {},
        "tags": {"code": "abc"},
    }
    return tracking.record_run(home, **(values | changes))


def fetch(home: Path, run_id: str):
    with speaking(home, "to look") as client:
        return client.get_run(run_id)


def test_a_run_holds_what_was_recorded(home: Path, tmp_path: Path) -> None:
    plots = tmp_path / "plots"
    plots.mkdir()
    (plots / "a.png").write_bytes(b"png")
    run_id = record(home, artifacts={"config.yaml": "kept: 0.6", "figures/all": plots})
    run = fetch(home, run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"kept": "0.6"}
    assert run.data.metrics == {"perplexity": 7.5}
    assert run.data.tags["code"] == "abc"
    folder = home / "mlartifacts" / run_id / "artifacts"
    assert (folder / "config.yaml").read_text() == "kept: 0.6"
    assert (folder / "figures/all/a.png").read_bytes() == b"png"


def test_more_and_longer_than_mlflow_takes_at_once(home: Path) -> None:
    run_id = record(
        home,
        parameters={f"p{i}": i for i in range(250)} | {"long": "x" * 20_000, "odd (name)": 1},
        metrics={f"m{i}": i for i in range(1500)} | {"text": "no number", "flag": True},
        tags={f"t{i}": "v" for i in range(150)} | {"long": "y" * 20_000},
    )
    data = fetch(home, run_id).data
    assert len(data.params) == 252
    assert len(data.metrics) == 1500
    assert data.params["long"].endswith(limits.CLIPPED)
    assert data.tags["long"].endswith(limits.CLIPPED)
    assert data.params["odd _name_"] == "1"


def test_curves_become_histories_of_metrics(home: Path) -> None:
    nan = float("nan")
    long = [float(step) for step in range(2500)]
    curves = {"recover/kl": [3.0, nan, 2.0, float("inf"), 1.5], "learn/kept": long, "none": [nan]}
    run_id = record(home, curves=curves)
    with speaking(home, "to look") as client:
        short = client.get_metric_history(run_id, "recover/kl")
        kept = client.get_metric_history(run_id, "learn/kept")
        data = client.get_run(run_id).data
    assert [(point.step, point.value) for point in short] == [(0, 3.0), (2, 2.0), (4, 1.5)]
    assert len(kept) == limits.POINTS
    assert [point.step for point in kept] == [int(point.value) for point in kept]
    assert (kept[0].step, kept[-1].step) == (0, 2499)
    assert max(b.step - a.step for a, b in pairwise(kept)) <= 3
    assert data.metrics == {"perplexity": 7.5, "recover/kl": 1.5, "learn/kept": 2499.0}


def test_a_run_that_cannot_be_finished_is_marked(home: Path) -> None:
    (home / "mlartifacts").write_text("a file where a folder belongs")
    with pytest.raises(tracking.TrackingError, match="refused to record the run"):
        record(home, artifacts={"a": "b"})
    with speaking(home, "to look") as client:
        runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert [run.info.status for run in runs] == ["FAILED"]


def test_a_registered_folder_comes_back_without_a_copy(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.artifacts import download_artifacts
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "a model"
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    before = sorted(folder.iterdir())
    tags = {"keys.collect": "k1,k2"}
    run_id = record(home)
    versions = [
        tracking.register_model(home, name="tiny", model_dir=folder, run_id=run_id, tags=tags)
        for _ in range(2)
    ]
    assert versions == [tracking.Registered("tiny", 1), tracking.Registered("tiny", 2)]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking.tracking_uri(home))  # as a user would
    found = Path(download_artifacts("models:/tiny/2"))
    assert found.resolve() == folder.resolve()
    assert sorted(folder.iterdir()) == before
    assert AutoModelForCausalLM.from_pretrained(found).config.hidden_size == 8
    assert not list((home / "mlartifacts").rglob("*.safetensors"))


def test_long_tags_are_read_back_whole(home: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    tags = {"keys.decompose": ",".join(f"{i:064x}" for i in range(300)), "seed": "0", "dense.1": ""}
    tracking.register_model(home, name="m", model_dir=empty, run_id=record(home), tags=tags)
    assert tracking.read_tags(home, "m", 1) == tags | {"files": "{}"}


def test_keys_of_all_versions_of_all_models(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "VERSIONS_PER_PAGE", 2)
    run_id = record(home)
    for number in range(5):
        tracking.register_model(
            home,
            name=f"m{number % 2}",
            model_dir=tmp_path,
            run_id=run_id,
            tags={"keys.collect": f"c{number} shared", "keys.weigh": f"w{number},x", "kept": "k"},
        )
    each = {f"{letter}{number}" for letter in "cw" for number in range(5)}
    assert tracking.registered_keys(home) == each | {"shared", "x"}
    versions = tracking.registered_versions(home)
    assert [(v.name, v.version) for v in versions] == [
        ("m0", 1),
        ("m0", 2),
        ("m0", 3),
        ("m1", 1),
        ("m1", 2),
    ]
    assert {v.run_id for v in versions} == {run_id}
    assert versions[0].source == tmp_path.resolve().as_uri()


def test_nothing_registered_makes_no_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking.registered_keys(tmp_path / "none") == set()
    assert not (tmp_path / "none").exists()


def test_an_unknown_version_is_one_clear_line(home: Path) -> None:
    with pytest.raises(tracking.TrackingError, match="nobody") as caught:
        tracking.read_tags(home, "nobody", 3)
    assert "\n" not in str(caught.value)


def test_nothing_on_stdout_and_no_name_looked_up(blank_home: Path, tmp_path: Path) -> None:
    shutil.copyfile(blank_home / "mlflow.db", tmp_path / "mlflow.db")
    script = """
import sys
from pathlib import Path
looked_up = []
def hook(event, args):
    if event in ("socket.getaddrinfo", "socket.connect"):
        looked_up.append(args)
sys.addaudithook(hook)
from tasks.tracking import client as tracking
assert "mlflow" not in sys.modules
home = Path(sys.argv[1])
from tasks.tracking.check import check_tracking
check_tracking(home, ["m"])
run_id = tracking.record_run(home, experiment="e", run_name="r", parameters={"a": 1},
                             metrics={"b": 2.0}, artifacts={"c": "d"}, tags={})
tracking.register_model(home, name="m", model_dir=home, run_id=run_id, tags={})
sys.exit(f"network: {looked_up}" if looked_up else 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.text("ab.0", min_size=1, max_size=4),
        st.one_of(st.text(max_size=5), st.integers(4990, 15_010).map(lambda n: "v" * n)),
        max_size=4,
    )
)
def test_join_undoes_split(tags: dict[str, str]) -> None:
    fitting = limits.split(tags)
    assert all(len(value) <= limits.TAG_LENGTH for value in fitting.values())
    if not any(f"{a}.0" in b for a in tags for b in tags):  # a part's name may not be taken
        assert limits.join(fitting) == tags
