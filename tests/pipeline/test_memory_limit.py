"""With --memory a run goes in small batches and by way of the disk, or says what does not fit."""

from pathlib import Path
from typing import Any

import pytest

from compress_core.errors import ConfigError
from flows.commands.plan import plan_as_run_or_sweep
from flows.report.console import Reporter
from flows.runs.estimate import refusal
from flows.runs.forecast import Planned
from flows.runs.opened import open_command, whole_notes
from flows.runs.workspace import LIBRARIES, open_workspace
from flows.settings.config import RunConfig
from tasks.engine.cost import Cost
from tests.pipeline import pico

LITTLE = 1_000_000  # bytes beyond the libraries, more than the small model's stages need


def test_states_that_do_not_fit_go_by_way_of_the_disk_and_nothing_else_changes(
    inputs: pico.Inputs, home: Path, cold_walk: pico.Walk
) -> None:
    method = {"method": "saes_svd:prefix=block", "batch_size": 4}
    free = pico.walk(inputs.settings(home / "free", **method))
    tight = pico.walk(inputs.settings(home / "tight", **method, memory=LIBRARIES + 4000))
    most = tight.pipeline.job.model.room.most
    assert most is not None and most < 4 * 5 * 48 * 32  # of one model on the evaluation text
    assert tight.digests == free.digests
    assert not list((home / "tight").glob("hidden-*"))


def test_the_batch_is_chosen_to_fit(inputs: pico.Inputs, home: Path) -> None:
    def batch(**how: Any) -> int:
        return open_workspace(RunConfig(**inputs.settings(home, **how))).batch_size

    assert batch() == 8
    assert batch(memory=LIBRARIES + 1) == 1
    assert 1 < batch(memory=LIBRARIES + 3_000_000) < 8
    assert batch(memory=LIBRARIES + 1, batch_size=5) == 5


def test_a_run_that_does_not_fit_is_refused_before_any_stage(
    inputs: pico.Inputs, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = inputs.settings(home, memory=LIBRARIES + 1000)
    opened = open_command(RunConfig(**settings), Reporter(quiet=True))
    with pytest.raises(ConfigError, match=r"^--memory 800 MB will not do: \w+, .* needs about"):
        opened.prepare()
    assert {path.name for path in (home / "store").glob("*/*/*/manifest.json")} <= {"manifest.json"}
    assert not list((home / "store" / "collect").glob("*/*"))
    plan_as_run_or_sweep(settings, None, False, print)
    words = " ".join(capsys.readouterr().out.split())
    assert "note --memory 800 MB will not do: " in words and "800 MB allowed in all" in words


def test_what_is_cached_needs_no_memory(
    inputs: pico.Inputs, warm_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = inputs.settings(warm_home, memory=LIBRARIES + 1000, batch_size=8)
    opened = open_command(RunConfig(**settings), Reporter(quiet=True))
    monkeypatch.setattr("flows.runs.opened.check_tracking", lambda *_: None)
    opened.prepare()


@pytest.mark.parametrize(
    ("whole", "advice"),
    [(True, "holds the whole model, which cannot go block by block"), (False, "--batch-size")],
)
def test_what_needs_too_much_is_named_with_what_would_help(whole: bool, advice: str) -> None:
    unit = Planned("recover", "factors", "run", "", None, Cost(held=1, whole=whole))
    assert refusal(unit, LITTLE, LIBRARIES + LITTLE) is None
    assert refusal(unit, LITTLE, None) is None
    reason = refusal(unit, LITTLE + 1, LIBRARIES + LITTLE)
    assert reason is not None and advice in reason
    assert "recover, factors needs about 801 MB, 800 of them for libraries" in reason


def test_a_training_of_the_whole_model_says_what_it_needs(inputs: pico.Inputs, home: Path) -> None:
    def notes(**how: Any) -> list[str]:
        opened = open_command(RunConfig(**inputs.settings(home, **how)), Reporter(quiet=True))
        return whole_notes(opened.pipelines, opened.workspace)

    (note,) = notes(recover="factors", recover_steps=4)
    assert note.startswith("recover trains the whole model, which cannot go block by block: ")
    assert notes(recover="blocks", recover_steps=4) == notes() == []
