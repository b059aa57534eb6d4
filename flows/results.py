"""The result of a run, as the one JSON object that users, MLflow and later runs read."""

import hashlib
import json
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

from pydantic import BaseModel

from flows.prepare import Pipeline, Workspace
from storage.disk import replace_file
from tasks.allocate import read_shares
from tasks.units import Outcome, Session


def collect_metrics(pipeline: Pipeline, session: Session) -> dict[str, dict[str, Any]]:
    """Metrics of the dense and the compressed model, the first text's on top."""
    metrics: dict[str, dict[str, Any]] = {
        which: {"texts": {}, "tasks": {}} for which in ("dense", "compressed")
    }
    for evaluation in pipeline.evaluations:
        values = dict(session.artifact(evaluation.unit).attrs)
        metrics[evaluation.model][f"{evaluation.kind}s"][evaluation.label] = values
    for values in metrics.values():
        if values["texts"]:
            first = next(iter(values["texts"].values()))
            values |= {"perplexity": first["perplexity"], "kl": first["kl"]}
    return metrics


def collect_result(
    workspace: Workspace, pipeline: Pipeline, session: Session, outcomes: list[Outcome]
) -> dict[str, Any]:
    """Everything but where the model was registered and how long it took."""
    config, model = pipeline.config, workspace.model
    shares = read_shares(session.artifact(pipeline.allocation))
    layers = model.layout.layers
    written = session.artifact(pipeline.folder).attrs
    return {
        "model": model.name,
        "model_dir": str(model_dir(pipeline, session)),
        "method": config.method,
        "kept": config.kept,
        "of": config.of,
        "seed": config.seed,
        "parameters": {
            "dense": model.parameters,
            "compressed": written["parameters"],
            "compressible_dense": sum(layer.dense_cost for layer in layers),
            "compressible_compressed": sum(shares[layer.name].cost(layer) for layer in layers),
        },
        "bytes": {"dense": model.checkpoint.nbytes, "compressed": written["bytes"]},
        "metrics": collect_metrics(pipeline, session),
        "stages": [as_stage(outcome) for outcome in outcomes],
        "notes": list(workspace.notes),
        "code_version": code_version(),
    }


def as_stage(outcome: Outcome) -> dict[str, Any]:
    """One unit's outcome as the result shows it."""
    return {
        "name": outcome.stage,
        "unit": outcome.unit,
        "key": outcome.key,
        "state": outcome.state,
        "seconds": round(outcome.seconds, 6),
    }


def model_dir(pipeline: Pipeline, session: Session) -> Path:
    """Where the model folder goes: --output, or a name of its own under the data directory."""
    config = pipeline.config
    if config.output is not None:
        return config.output
    key = session.manifests[pipeline.folder].key
    name = f"{Path(config.model).name}-{config.method}-{config.kept:g}-{key[:8]}"
    return config.home.expanduser().absolute() / "models" / name


def code_version() -> str:
    """Version of the distribution, and a digest of all its source files."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for package in ("compress_core", "storage", "tasks", "flows"):
        for file in sorted((root / package).rglob("*.py")):
            digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return f"{version('eigenpress')}+{digest.hexdigest()[:12]}"


def save_run_record(home: Path, config: BaseModel | None, result: dict[str, Any]) -> Path:
    """Writes what a run made, so that garbage collection knows what recent runs reach."""
    folder = home.expanduser() / "runs"
    folder.mkdir(exist_ok=True)
    now = datetime.now(UTC)
    file = folder / f"{now:%Y%m%dT%H%M%S}-{uuid4().hex[:8]}.json"
    record = {
        "created": now.isoformat(),
        "config": config and config.model_dump(mode="json"),
        "result": result,
    }
    replace_file(file, json.dumps(record, ensure_ascii=False, indent=1).encode())
    return file
