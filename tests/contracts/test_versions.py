"""A registered version is found by every name it has, with its files and its run's metrics."""

import shutil
from pathlib import Path

import pytest

from compress_core.errors import ConfigError
from flows.runs.referring import folder_or_version
from tasks.tracking import client as tracking
from tasks.tracking import versions
from tasks.tracking.speaking import TrackingError, speaking


@pytest.fixture(scope="module")
def home(blank_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two versions of "m" in one folder, the first with an alias, and a version from before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        home = tmp_path_factory.mktemp("versions") / "home"
        shutil.copytree(blank_home, home)
        folder = home / "a model"
        (folder / "code").mkdir(parents=True)
        (folder / "weights").write_bytes(b"1234")
        (folder / "code" / "a.py").write_text("1")
        runs = [_record(home, metrics={"compressed/perplexity": 7.5 + n}) for n in range(2)]
        for run_id in runs:
            tracking.register_model(home, name="m", model_dir=folder, run_id=run_id, tags={})
        with speaking(home, "to prepare") as client:
            client.set_registered_model_alias("m", "champion", "1")
            for name in ("old", "odd@name"):
                client.create_registered_model(name)
                client.create_model_version(name, folder.as_uri(), runs[0], await_creation_for=0)
    return home


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def _record(home: Path, metrics: dict[str, float]) -> str:
    return tracking.record_run(
        home,
        experiment="tests",
        run_name="one",
        parameters={},
        metrics=metrics,
        artifacts={},
        tags={},
    )


@pytest.mark.parametrize(("asked", "number"), [("m", 2), ("m@champion", 1), ("m/1", 1)])
def test_a_version_by_each_of_its_names(home: Path, asked: str, number: int) -> None:
    version = versions.find_version(home, asked)
    assert (version.name, version.version) == ("m", number)
    assert versions.model_folder(home, version) == home / "a model"
    assert folder_or_version(asked, home) == (home / "a model", version)
    assert versions.find_version(home, "odd@name").name == "odd@name"
    assert versions.read_aliases(home, "m") == {"champion": 1}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("none", "no registered model is called 'none'; there are m, odd@name, old"),
        ("m@best", "'m' has no alias 'best'; its aliases are champion"),
        ("old@best", "'old' has no alias 'best'; it has no alias"),
        ("m/7", "'m' has no version 7; it has 2, 1"),
        ("m/x", "write NAME, NAME@ALIAS or NAME/NUMBER"),
        ("models:/m", "write NAME, NAME@ALIAS or NAME/NUMBER"),
        ("", "write NAME, NAME@ALIAS or NAME/NUMBER"),
    ],
)
def test_what_is_not_there_is_one_line_that_says_what_is(home: Path, asked: str, said: str) -> None:
    with pytest.raises(TrackingError) as caught:
        versions.find_version(home, asked)
    assert said in str(caught.value)
    with pytest.raises(ConfigError) as refused:
        folder_or_version(asked, home)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_folder_comes_before_a_name(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "file").touch()
    assert folder_or_version("m", home) == (Path("m"), None)
    assert folder_or_version("./m", home) == (Path("m"), None)
    for text, said in (("./x", "no folder ./x"), ("file", "is a file"), ("~nobody9/x", "nobody9")):
        with pytest.raises(ConfigError, match=said):
            folder_or_version(text, home)


def test_every_file_is_what_was_registered(home: Path, tmp_path: Path) -> None:
    version = versions.find_version(home, "m/1")
    folder = tmp_path / "copy"
    shutil.copytree(home / "a model", folder)
    (folder / "registered_model_meta").write_text("of MLflow")  # it writes this when it loads
    (folder / "code" / "__pycache__").mkdir()
    (folder / "code" / "__pycache__" / "a.pyc").write_bytes(b"of Python")
    (folder / "eigenpress.yaml").write_text("of another run that made the same model")
    assert versions.check_files(folder, version)
    (folder / "weights").write_bytes(b"1244")
    (folder / "code" / "a.py").unlink()
    (folder / "code" / "b.py").touch()
    with pytest.raises(TrackingError) as caught:
        versions.check_files(folder, version)
    for said in ("code/a.py is missing", "code/b.py was added", "weights was altered", "m version"):
        assert said in str(caught.value)
    assert not versions.check_files(folder, versions.find_version(home, "old"))


def test_files_that_are_gone(home: Path) -> None:
    version = versions.find_version(home, "m")
    gone = tracking.Version("m", 2, (home / "gone").as_uri(), version.run_id, 0.0, {})
    with pytest.raises(TrackingError, match="the files of m version 2 are gone"):
        versions.model_folder(home, gone)


def test_metrics_join_those_of_the_run(home: Path) -> None:
    version = versions.find_version(home, "m/2")
    versions.log_metrics(home, version, {"speed/decode": 3.5, "speed/prefill": 1})
    versions.log_metrics(home, version, {"speed/decode": 4.5})
    found = versions.run_metrics(home, version)
    assert found == {"compressed/perplexity": 8.5, "speed/decode": 4.5, "speed/prefill": 1.0}
    with pytest.raises(TrackingError, match="speed/text is no number"):
        versions.log_metrics(home, version, {"speed/text": "fast"})  # type: ignore[dict-item]


def test_an_artifact_of_a_run_is_downloaded_once(home: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"5678")
    run_id = tracking.record_run(
        home,
        experiment="tests",
        run_name="two",
        parameters={},
        metrics={},
        artifacts={"model": tmp_path / "model"},
        tags={},
    )
    source = f"runs:/{run_id}/model"
    with speaking(home, "to prepare") as client:
        client.create_registered_model("away")
        client.create_model_version("away", source, run_id, await_creation_for=0)
    version = versions.find_version(home, "away")
    folder = versions.model_folder(home, version)
    assert (folder / "weights").read_bytes() == b"5678"
    assert [one.name for one in folder.parent.iterdir()] == [folder.name]
    (folder / "weights").write_bytes(b"kept")
    assert (versions.model_folder(home, version) / "weights").read_bytes() == b"kept"
