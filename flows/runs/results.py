"""The result of a run, as the one JSON object that users, MLflow and later runs read."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from compress_core.secrets import hide_all
from flows.runs.foretold import passed_over, predicted_kl
from flows.runs.pipeline import Evaluation, Pipeline
from flows.runs.workspace import Workspace
from flows.settings.config import RunConfig
from storage.artifact import Artifact
from storage.keys import recipe_key
from tasks.engine.session import Session
from tasks.engine.units import Outcome
from tasks.promotion.metrics import Measured
from tasks.stages.evaluate import WINDOWS
from tasks.stages.learn import CURVES
from tasks.stages.recover import TENSOR

LONGEST = 200  # bytes of a folder's name before its key; 255 are all that file systems take


def collect_metrics(
    evaluations: Sequence[Evaluation], session: Session
) -> dict[str, dict[str, Any]]:
    """Metrics of the dense and the compressed model, the first text's on top.

    Where the compressed model was trained on there are those from before, as "unrecovered".
    """
    metrics: dict[str, dict[str, Any]] = {
        evaluation.model: {"texts": {}, "tasks": {}} for evaluation in evaluations
    }
    for evaluation in evaluations:
        values = dict(session.artifact(evaluation.unit).attrs)
        metrics[evaluation.model][f"{evaluation.kind}s"][evaluation.label] = values
    for values in metrics.values():
        if values["texts"]:
            first = next(iter(values["texts"].values()))
            values |= {"perplexity": first["perplexity"], "kl": first["kl"]}
    return metrics


def windows_of(
    evaluations: Sequence[Evaluation], session: Session
) -> dict[str, dict[str, list[float]]]:
    """Model and text to the mean negative log likelihood of every window, nats per token."""
    found: dict[str, dict[str, list[float]]] = {}
    for evaluation in evaluations:
        if evaluation.kind == "text":
            values = session.artifact(evaluation.unit).array(WINDOWS).tolist()
            by_text = found.setdefault(evaluation.model, {})
            by_text[evaluation.label] = [float(f"{value:.7g}") for value in values]
    return found


def collect_result(
    workspace: Workspace, pipeline: Pipeline, session: Session, outcomes: list[Outcome]
) -> dict[str, Any]:
    """Everything but where the model was registered and how long it took."""
    config, model = pipeline.config, workspace.model
    layers = model.layout.layers
    written = session.artifact(pipeline.folder).attrs
    result = {
        "model": model.name,
        "model_dir": str(model_dir(pipeline, session)),
        "method": config.label,
        "options": config.options,
        "kept": config.kept,
        "of": config.of,
        "seed": config.seed,
        "compute": model.compute_dtype,
        "parameters": {
            "dense": model.parameters,
            "compressed": written["parameters"],
            "compressible_dense": sum(layer.dense_cost for layer in layers),
            "compressible_compressed": written["compressible"],
        },
        "bytes": {"dense": model.nbytes, "compressed": written["bytes"]},
        "memory": written["memory"],
        **kinds_of(pipeline, session),
        **predicted_of(pipeline, session),
        "metrics": collect_metrics(pipeline.evaluations, session),
        "windows": windows_of(pipeline.evaluations, session),
        "measured": vars(measured_of(workspace, pipeline.evaluations, session)),
        **asking_of(config),
        "stages": [as_stage(outcome) for outcome in outcomes],
        "notes": list(workspace.notes),
        "code_version": code_version(),
        **learned_of(pipeline, session),
    }
    return cast(dict[str, Any], hide_all(result))


def measured_of(
    workspace: Workspace, evaluations: Sequence[Evaluation], session: Session
) -> Measured:
    """What the metrics were measured on, so that a promotion knows what it may compare."""
    texts, tasks = {}, {}
    for evaluation in evaluations:
        unit = evaluation.unit
        if evaluation.kind == "text":
            texts[evaluation.label] = session.manifests[unit.inputs["evaluation tokens"]].digest
        else:
            asked = {name: value for name, value in unit.settings.items() if name != "dtype"}
            tasks[evaluation.label] = recipe_key(asked)
    return Measured(workspace.model.digest, workspace.model.compute_dtype, texts, tasks)


def asking_of(config: RunConfig) -> dict[str, Any]:
    """How tasks were asked ("asked"), where there were any."""
    if not config.tasks:
        return {}
    names = ("task_limit", "num_fewshot", "apply_chat_template")
    return {"asked": {name: getattr(config, name) for name in names}}


def predicted_of(pipeline: Pipeline, session: Session) -> dict[str, Any]:
    """The KL that the allocation was predicted to leave ("predicted"), where something says it.

    Of a price list also what it would have left with less on it ("passed_over").
    """
    found = predicted_kl(pipeline, session.artifact)
    others = passed_over(pipeline, session.artifact)
    told: dict[str, Any] = {} if found is None else {"predicted": found}
    return told | ({"passed_over": others} if others else {})


def learned_of(pipeline: Pipeline, session: Session) -> dict[str, Any]:
    """Of a method that trains: what it found ("learned"), and the course of kl and kept."""
    for artifact in _trained(pipeline, session, "learn"):
        curves = {
            name: [float(f"{value:.4g}") for value in artifact.array(name)]
            for name in ("kl", "kept")
            if name in artifact.names
        }
        return {"learned": dict(artifact.attrs["report"]), "curves": curves}
    return {}


def kinds_of(pipeline: Pipeline, session: Session) -> dict[str, float]:
    """Parts of all the layers' numbers that are entries, and that are of layers of columns alone.

    Each ("entries", "columns") where it is neither none nor all.
    """
    stored = list(stored_of(pipeline, session).values())
    # A layer of entries alone may hold them in codes, which count as fewer numbers.
    entries = sum(
        layer["nonzeros"] if layer["rank"] else layer["numbers"]
        for layer in stored
        if layer["nonzeros"]
    )
    of_columns = [x for x in stored if x["columns"] and not x["rank"] and not x["nonzeros"]]
    found = {"entries": entries, "columns": sum(layer["numbers"] for layer in of_columns)}
    numbers = sum(layer["numbers"] for layer in stored)
    return {name: part / numbers for name, part in found.items() if 0 < part < numbers}


def stored_of(pipeline: Pipeline, session: Session) -> dict[str, dict[str, Any]]:
    """Layer to the rank (None when dense), kept columns and numbers that it stores."""
    return {name: dict(session.artifact(unit).attrs) for name, unit in pipeline.realised.items()}


def curves_of(pipeline: Pipeline, session: Session) -> dict[str, list[float]]:
    """Stage and name, "recover/kl", to a value per step, of all that the run trained.

    Those of blocks that were trained one by one follow one another.
    """
    found: dict[str, list[float]] = {}
    for stage in ("learn", "recover"):
        for artifact in _trained(pipeline, session, stage):
            for name in artifact.names:
                if not name.startswith(TENSOR):
                    found.setdefault(f"{stage}/{name}", []).extend(artifact.array(name).tolist())
    return found


def _trained(pipeline: Pipeline, session: Session, stage: str) -> Iterator[Artifact]:
    """What holds the curves of a stage that trains; nothing where the run has none."""
    for unit in (unit for group in pipeline.groups for unit in group.units):
        if unit.stage == stage and (stage == "recover" or unit.name == CURVES):
            yield session.artifact(unit)


def as_stage(outcome: Outcome) -> dict[str, Any]:
    """One unit's outcome as the result shows it."""
    return {
        "name": outcome.stage,
        "unit": outcome.unit,
        "key": outcome.key,
        "state": outcome.state,
        "seconds": round(outcome.seconds, 6),
        "cpu_seconds": None if outcome.cpu_seconds is None else round(outcome.cpu_seconds, 3),
    }


def model_dir(pipeline: Pipeline, session: Session) -> Path:
    """Where the model folder goes: --output, or a name of its own under the data directory."""
    config = pipeline.config
    if config.output is not None:
        return config.output
    key = session.manifests[pipeline.folder].key
    method = re.sub(r"[^\w.@=+-]", "-", config.label)  # colons are no part of a folder's name
    said = f"{Path(config.model).name}-{method}-{config.kept:g}".encode()[:LONGEST]
    name = f"{said.decode(errors='ignore')}-{key[:8]}"
    return config.home.expanduser().absolute() / "models" / name


def registered_name(config: RunConfig, model: str) -> str:
    """What the registered model is called: --name, or as the dense model without MLflow's signs."""
    return config.name or re.sub("[/:]", "-", model)


def code_version() -> str:
    """Version of the distribution, and a digest of all its source files."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for package in ("compress_core", "storage", "tasks", "flows"):
        for file in sorted((root / package).rglob("*.py")):
            digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return f"{version('eigenpress')}+{digest.hexdigest()[:12]}"
