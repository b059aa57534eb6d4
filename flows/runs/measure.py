"""Measures two versions again on the same texts and tasks: those of the version that asks.

Its configuration lies beside its model, so the dense model and the texts have to be where they were
when it was made. Windows come from the store; what is measured is the folders.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from compress_core.errors import ConfigError
from compress_core.hf.lm_eval_tasks import run_tasks
from compress_core.hf.loading import load_model
from flows.runs.pipeline import Evaluation, evaluation_groups
from flows.runs.results import measured_of
from flows.runs.workspace import Workspace, open_workspace
from flows.settings.checks import choose_device
from flows.settings.config import RunConfig, build_config
from flows.settings.output import CONFIG_FILE
from tasks.engine.session import Session
from tasks.promotion.metrics import SPEED, Measurements
from tasks.stages.arrays import get_tensor
from tasks.stages.evaluate import scores_of, text_metrics
from tasks.tracking.client import Version
from tasks.tracking.limits import fit_name
from tasks.tracking.versions import check_files, model_folder, run_metrics

REPEATS = 3
OF_MODEL = "compressed/"  # what a run's metrics of the model's quality begin with


def measure_both(
    home: Path,
    folder: Path,
    own: Measurements,
    champion: Version,
    trust_remote_code: bool,
    tell: Callable[[str], None],
) -> tuple[Measurements, Measurements]:
    """What both versions come to on the texts and tasks of the one that asks.

    The numbers that it has already stay, where they were measured on just that.

    Args:
        home: The data directory.
        folder: Of the version that asks.
        own: What is known of it.
        champion: The present champion.
        trust_remote_code: Whether the folders' own Python may run.
        tell: Told what is measured.

    Raises:
        ConfigError: Its configuration is not beside it.
        CompressError: The dense model, a text or a task is not where it was.
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise ConfigError(
            f"--measure needs {file}, which says what version {own.version} was measured on"
        )
    given: dict[str, Any] = {"home": home, "trust_remote_code": trust_remote_code}
    config = build_config(RunConfig, given, file)
    workspace = open_workspace(config)
    session = Session(workspace.store, confirm=workspace.confirm)
    texts = workspace.texts[1]
    for group in texts.values():
        session.run(group)
    _, evaluations = evaluation_groups(workspace, config, texts, {})
    measured = measured_of(workspace, evaluations, session)

    def again(number: int, place: Path, metrics: dict[str, float]) -> Measurements:
        tell(f"measuring version {number} on the texts and tasks of version {own.version}")
        kept = {name: value for name, value in metrics.items() if not name.startswith(OF_MODEL)}
        fresh = _measure(workspace, config, session, evaluations, place)
        return Measurements(number, kept | fresh, measured)

    place = model_folder(home, champion)
    check_files(place, champion)
    other = again(champion.version, place, run_metrics(home, champion))
    return own if own.measured == measured else again(own.version, folder, dict(own.metrics)), other


def _measure(
    workspace: Workspace,
    config: RunConfig,
    session: Session,
    evaluations: list[Evaluation],
    folder: Path,
) -> dict[str, float]:
    """The metrics of one folder, named as a run's are."""
    dense, device = workspace.model, workspace.model.device
    model = None
    specs = {spec.name: spec for spec in workspace.tasks}
    asking = {n: getattr(config, n) for n in ("num_fewshot", "apply_chat_template")}
    found: dict[str, float] = {}
    for evaluation in evaluations:
        label = evaluation.label
        if evaluation.kind == "text":
            tokens = session.artifact(evaluation.unit.inputs["evaluation tokens"])
            windows = get_tensor(tokens, "tokens")
            metrics, _ = text_metrics(dense, folder, windows, workspace.batch_size)
            scores = {"perplexity": metrics.perplexity, "nll": metrics.nll, "kl": metrics.kl or 0.0}
            for name in ("perplexity", "kl"):  # the first text's have no label
                found.setdefault(f"{OF_MODEL}{name}", scores[name])
        else:
            logging.getLogger("lm_eval").setLevel(logging.ERROR)  # warns of a loaded model
            if model is None:
                model = load_model(
                    folder,
                    device,
                    trust_remote_code=config.trust_remote_code,
                    dtype=dense.compute_dtype,
                )
            results = run_tasks(
                model,
                dense.tokenizer,
                [specs[label]],
                batch_size=workspace.batch_size,
                device=device,
                limit=config.task_limit,
                **asking,
            )
            scores = scores_of(label, results)
        found |= {fit_name(f"{OF_MODEL}{label}/{name}"): v for name, v in scores.items()}
    return found


def speed_of_both(
    folder: Path, own: Measurements, there: Path, champion: Measurements, compute: str, trust: bool
) -> tuple[Measurements, Measurements]:
    """Both versions with the speed that they have here and now, measured in turns.

    One prompt of 128 tokens and 32 new ones, the median of three repeats.

    Args:
        folder: Of the version that asks.
        own: What is known of it.
        there: The champion's folder.
        champion: What is known of it.
        compute: The dtype that both run in; "auto" for their own.
        trust: Whether the folders' own Python may run.

    Raises:
        ModelError: A model does not load, or its context is shorter than that.
    """
    from compress_core.hf.speed import Load, check_load, in_turns, peak_bytes

    load, device = Load(1, 128, 32), choose_device("auto")
    folders = {own.version: folder, champion.version: there}
    for one in folders.values():
        check_load(one, load)
    models = {
        number: load_model(one, device, trust_remote_code=trust, dtype=compute)
        for number, one in folders.items()
    }
    speeds = in_turns(models, [load], REPEATS)
    del models
    found = []
    for known in (own, champion):
        numbers = speeds[known.version][0].metrics()
        peak = peak_bytes(folders[known.version], load, device, compute, trust)
        numbers["peak_bytes"] = float(peak)
        fresh = {f"{SPEED}{name}": float(value) for name, value in numbers.items()}
        slow = {n: v for n, v in known.metrics.items() if not n.startswith(SPEED)}
        found.append(replace(known, metrics=slow | fresh, speed="here and now"))
    return found[0], found[1]
