"""`eigenpress report`: the runs that a word names, and a page of what is left of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress_core.errors import ConfigError
from flows.commands.cli import app
from flows.runs.asked import find_asked
from flows.runs.page import shown_of
from flows.runs.samples import LEFT_OUT, write_samples
from tasks.tracking.speaking import TrackingError
from tests.pipeline import pico
from tests.report_pages import assert_alone

Shell = Callable[..., dict[str, Any]]


@pytest.fixture
def report(server_environment: dict[str, str], capsys: pytest.CaptureFixture[str]) -> Shell:
    """Calls the command as the command line does; what it prints with --json."""

    def call(*words: str) -> dict[str, Any]:
        with pico.environment(server_environment):
            app(["report", *words, "--json"], standalone_mode=False)
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return call


def test_a_run_has_a_page_with_its_numbers(
    report: Shell, cold: dict[str, Any], cold_home: Path, tmp_path: Path
) -> None:
    file = tmp_path / "page" / "a.html"
    given = (cold["run_id"], "--home", str(cold_home), "--generate", "1", "--output", str(file))
    assert report(*given) == {"report": str(file), "runs": [cold["run_id"]], "problem": None}
    page = assert_alone(file.read_text(encoding="utf-8"))
    (_, dense), (name, values) = page.rows["results"]
    found = cold["metrics"]["compressed"]
    assert name == cold["method"]
    assert values[:3] == [cold["kept"], found["perplexity"], found["kl"]]
    assert dense[1] == cold["metrics"]["dense"]["perplexity"]
    samples = page.sections["samples"]
    assert "dense" in samples and f"{cold['method']} kept {cold['kept']:g}" in samples
    logged = cold_home / "mlartifacts" / cold["run_id"] / "artifacts" / "report.html"
    assert logged.read_bytes() == file.read_bytes()


def test_the_picture_of_the_cut_is_that_of_the_run(cold: dict[str, Any], cold_home: Path) -> None:
    (run,) = shown_of(cold_home, find_asked(cold_home, cold["model_dir"], print))
    assert not isinstance(run.allocation, str) and not isinstance(run.spectra, str)
    stored = sum(own["numbers"] for own in run.allocation.stored.values())
    assert stored == cold["parameters"]["compressible_compressed"]
    assert run.spectra.values.keys() == run.allocation.stored.keys()
    assert not isinstance(run.prediction, str) and run.prediction.error is not None
    assert list(run.prediction.error) == sorted(run.prediction.error, reverse=True)
    assert all(share <= 0.9 for share in run.prediction.shares)


def test_a_run_is_found_by_everything_that_it_is_called(
    cold: dict[str, Any], cold_home: Path
) -> None:
    (name,) = [
        file.stem
        for file in (cold_home / "runs").glob("*.json")
        if cold["run_id"] in file.read_text()
    ]
    version = cold["registered"]
    words = [name, name[:-2], cold["run_id"], cold["run_id"][:9], cold["model_dir"]]
    words.append(f"{version['name']}/{version['version']}")
    for word in words:
        asked = find_asked(cold_home, word, print)
        assert (asked.name, asked.sweep) == (name, False), word
        assert asked.runs[0]["result"]["run_id"] == cold["run_id"]
    assert find_asked(cold_home, None, print).runs


def test_a_damaged_record_is_told_and_the_others_are_found(
    cold: dict[str, Any], cold_home: Path, tmp_path: Path
) -> None:
    shutil.copytree(cold_home / "runs", tmp_path / "runs")
    (tmp_path / "runs" / "00000000T000000-00000000.json").write_text("{}")
    told: list[str] = []
    found = find_asked(tmp_path, cold["run_id"], told.append)
    assert found.runs[0]["result"]["run_id"] == cold["run_id"]
    assert len(told) == 1 and "is damaged" in told[0]


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("pica", "Did you mean 'pico'?"),
        ("pico/99", "has no version 99"),
        ("pico@best", "has no alias 'best'"),
        ("./nowhere", "there is no ./nowhere"),
        ("/", "is neither the model folder of a run"),
        ("", "there is no run, sweep or model called ''"),
    ],
)
def test_what_is_not_there_is_refused_with_the_nearest(
    word: str, says: str, cold_home: Path
) -> None:
    with pytest.raises((ConfigError, TrackingError), match=says.replace("?", r"\?")):
        find_asked(cold_home, word, print)


def test_what_the_store_has_lost_is_said_on_the_page(
    report: Shell, cold: dict[str, Any], cold_home: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    shutil.copytree(cold_home / "runs", home / "runs")
    shutil.copyfile(cold_home / "mlflow.db", home / "mlflow.db")
    found = report(cold["run_id"], "--home", str(home))
    page = assert_alone(Path(found["report"]).read_text(encoding="utf-8"))
    assert "The store no longer has" in page.sections["prediction"]
    assert "The store no longer has" in page.sections["spectra"]
    assert "evaluation text is not in the store" in page.sections["samples"]
    assert len(page.rows["results"]) == 2


def test_a_folder_that_is_another_runs_now_does_not_write(
    cold: dict[str, Any], cold_home: Path
) -> None:
    asked = find_asked(cold_home, cold["run_id"], print)
    shown = shown_of(cold_home, asked)
    assert write_samples(cold_home, shown, 0, [], print) == LEFT_OUT
    (fields,) = asked.runs
    fields["config"] = {**fields["config"], "seed": 99}
    other = shown_of(cold_home, asked)
    assert "is not there any more" in str(write_samples(cold_home, other, 0, ["a"], print))


def test_prefect_shows_the_result_and_the_model(
    cold: dict[str, Any], server_environment: dict[str, str]
) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.sorting import ArtifactSort

    with pico.environment(server_environment), get_client(sync_client=True) as client:
        made = client.read_artifacts(sort=ArtifactSort.CREATED_DESC, limit=200)
    tables = [json.loads(str(one.data)) for one in made if one.key == "eigenpress-result"]
    rows = [row for (row,) in tables if row["folder"] == cold["model_dir"]]
    found = cold["metrics"]["compressed"]
    assert [row["perplexity"] for row in rows] == [found["perplexity"]] * len(rows) and rows
    links = [str(one.data) for one in made if one.key == "eigenpress-model"]
    assert any(Path(cold["model_dir"]).as_uri() in link for link in links)
    assert all(one.flow_run_id for one in made)
