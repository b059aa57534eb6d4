"""What a scheduled run registers, and what clean-up frees."""

import shutil
from pathlib import Path
from typing import Any

from flows.settings.config import RunConfig
from tests.pipeline import pico
from tests.pipeline.conftest import Run


def scheduled(flow: Any, environment: dict[str, str], **parameters: Any) -> tuple[str, Any]:
    """The message and the result of a flow as a deployment runs it."""
    from flows.server import runtime

    with pico.environment(environment), runtime.flow_settings():
        state = flow(**parameters, return_state=True)
        return state.message, state.result()


def test_only_what_changed_by_content_becomes_a_version(
    run: Run,
    inputs: pico.Inputs,
    cold_home: Path,
    blank_home: Path,
    server_environment: dict[str, str],
    tmp_path: Path,
) -> None:
    from flows.runs.execute import run_flow

    copy, home = pico.copy_inputs(inputs, tmp_path), tmp_path / "home"
    shutil.copytree(cold_home / "store", home / "store")
    shutil.copyfile(blank_home / "mlflow.db", home / "mlflow.db")
    config = RunConfig(**copy.settings(home))

    def again(**more: Any) -> tuple[str, Any]:
        message, result = scheduled(run_flow, server_environment, config=config, **more)
        return message, result["registered"]

    assert again()[1] == {"name": "pico", "version": 1}
    same = {"name": "pico", "version": 1, "unchanged": True}
    message, registered = again()
    assert message.startswith("nothing changed: all ") and registered == same
    name = "model.layers.1.mlp.up_proj.weight"
    pico.change_weight(copy.model, name, lambda weight: weight * 1.5)  # under the same path
    message, registered = again()
    assert " computed, " in message and message.endswith("; new: pico version 2")
    assert again()[1] == {**same, "version": 2}
    assert again(register_unchanged=True)[1] == {"name": "pico", "version": 3}


def test_clean_up_says_what_it_would_free_and_frees_it(
    warm_home: Path, blank_home: Path, server_environment: dict[str, str]
) -> None:
    """No run made these artifacts, and no version needs them."""
    from flows.runs.clean import clean_flow

    shutil.copyfile(blank_home / "mlflow.db", warm_home / "mlflow.db")
    dry, would = scheduled(
        clean_flow, server_environment, home=warm_home, dry_run=True, recent_days=0
    )
    assert dry.startswith("would free") and would["removed"] == sum(pico.UNITS.values())
    message, freed = scheduled(clean_flow, server_environment, home=warm_home, recent_days=0)
    assert message == dry.replace("would free", "freed")
    assert freed == {**would, "dry_run": False}
    _, rest = scheduled(clean_flow, server_environment, home=warm_home, recent_days=0)
    assert (rest["removed"], rest["kept"]) == (0, 0)
