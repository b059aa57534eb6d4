"""The demonstration: train a small Llama, compress it in four ways at two budgets, let it write."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress_core.hf.pretrain import PretrainSettings
from compress_core.hf.writing import write_on
from flows.report.console import Reporter
from flows.runs.execute import execute_in_flow
from flows.runs.hands import Here
from flows.runs.opened import open_command
from flows.runs.records import save_run_record, tell_others
from flows.runs.results import as_stage
from flows.runs.run import in_flow, run_groups
from flows.runs.stores import open_store
from flows.settings.config import SweepConfig
from flows.settings.home import default_store, open_home
from storage.occupancy import in_use
from tasks.engine.session import Session
from tasks.stages.pretrain import publish_trained, train_group

KEPT = (0.4, 0.2)
BEST = "svd_llm@hull"
METHODS = ("svd", "svd_llm", BEST, "sparsegpt")
WRITERS = ("svd", BEST)  # at the first budget
PROMPT = "    def __init__(self"
WORDS = 20  # tokens that each model writes


def run_demo(home: Path, settings: PretrainSettings, reporter: Reporter) -> list[dict[str, Any]]:
    """Trains the model if it is not cached, then sweeps.

    Args:
        home: Data directory.
        settings: Everything that decides the trained model.
        reporter: Who tells people.

    Returns:
        The results of the sweep.
    """
    open_home(home)
    store = open_store(home, default_store(), reporter.say)
    store.begin()
    session = Session(store, listener=reporter.inside)
    group = train_group(settings)
    with in_use(session.store.root):
        outcomes = in_flow(
            "eigenpress demo",
            "train",
            None,
            lambda: run_groups([group], session, reporter, Here(session)),
        )
        stages = [as_stage(outcome) for outcome in outcomes]
        record = save_run_record(home, None, {"stages": stages})  # `store gc` keeps what it trained
        tell_others(record, store, reporter.note)
    folder = home / "demo"
    publish_trained(session.artifact(group.units[0]), folder)
    sweep = SweepConfig(
        model=str(folder / "python-llama"),
        methods=list(METHODS),
        kept=list(KEPT),
        calibration=str(folder / "calibration.jsonl"),
        eval_text=[str(folder / "evaluation.jsonl")],
        samples=64,
        length=settings.context,
        eval_windows=64,
        home=home,
    )
    opened = open_command(sweep, reporter)
    opened.prepare()
    results: list[dict[str, Any]] = execute_in_flow(opened)
    return results


def demo_words(home: Path, results: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """How the dense model and two compressed ones go on after the prompt, by name."""
    folders = {"dense": home / "demo" / "python-llama"}
    for result in results:
        if result["method"] in WRITERS and result["kept"] == KEPT[0]:
            folders[f"{result['method']} kept {KEPT[0]:g}"] = Path(result["model_dir"])
    return {name: write_on(folder, PROMPT, WORDS) for name, folder in folders.items()}
