"""The demonstration: train a small Llama, then compress it in several ways at three budgets."""

from pathlib import Path
from typing import Any

from prefect import flow

from compress_core.hf.pretrain import PretrainSettings
from flows.report.console import get_reporter
from flows.report.results import as_stage, save_run_record
from flows.runs.run import run_groups
from flows.runs.sweep import sweep_flow
from flows.settings.config import SweepConfig
from flows.settings.home import open_home
from storage.store import Store
from tasks.engine.session import Session
from tasks.stages.pretrain import publish_trained, train_group

KEPT = (0.8, 0.6, 0.4)
METHODS = (  # few probe windows: the tables are for quality, the demonstration is for speed
    "svd",
    "asvd",
    "svd_llm",
    "ada_svd",
    "duo_svd:probe_windows=4",
    "saes_svd",
    "svd_llm@hull:probe_windows=8",
)


@flow(name="eigenpress demo", persist_result=False)
def demo_flow(home: Path, settings: PretrainSettings) -> list[dict[str, Any]]:
    """Trains the model if it is not cached, then sweeps.

    Args:
        home: Data directory.
        settings: Everything that decides the trained model.

    Returns:
        The results of the sweep.
    """
    open_home(home)
    reporter = get_reporter()
    session = Session(Store(home / "store", on_problem=reporter.say), listener=reporter.inside)
    group = train_group(settings)
    outcomes = run_groups([group], session)
    stages = [as_stage(outcome) for outcome in outcomes]
    save_run_record(home, None, {"stages": stages})  # so that `store gc` keeps what it trained
    folder = home / "demo"
    publish_trained(session.artifact(group.units[0]), folder)
    return sweep_flow(
        SweepConfig(
            model=str(folder / "python-llama"),
            methods=list(METHODS),
            kept=list(KEPT),
            calibration=str(folder / "calibration.jsonl"),
            eval_text=[str(folder / "evaluation.jsonl")],
            samples=128,
            length=settings.context,
            home=home,
        )
    )
