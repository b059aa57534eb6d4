"""Stage ``register``: the run is tracked and its model becomes a version in the registry.

A side effect, so it is never cached.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from compress_core.forms.names import FULL
from tasks.engine.dense_model import DenseModel
from tasks.tracking import client as tracking
from tasks.tracking.files import CONFIG_FILE, FILES_TAG, files_tag
from tasks.tracking.plots import plot_allocation, plot_training

KEY_LENGTH = 20  # characters of a key in a tag: unique, and `store why` takes any prefix


@task(cache_policy=NO_CACHE, persist_result=False, task_run_name="register · {name}")
def register(
    name: str,
    home: Path,
    model: DenseModel,
    stored: dict[str, dict[str, Any]],
    result: dict[str, Any],
    config: str,
    curves: Mapping[str, Sequence[float]] | None = None,
) -> dict[str, Any]:
    """Logs parameters, metrics and artifacts, and registers the model folder.

    Args:
        name: Name in the registry.
        home: Data directory.
        model: The dense model.
        stored: Layer name to what it stores: rank, columns, numbers and its entry.
        result: The run's result so far.
        config: The resolved configuration, as YAML.
        curves: Name to a value per step of what the run trained.

    Returns:
        ``{"name", "version", "run_id"}``.
    """
    with TemporaryDirectory() as folder:
        picture = Path(folder) / "allocation.png"
        plot_allocation(model.layout.layers, stored, picture)
        pictures: dict[str, Path] = {}
        if "kept" in result.get("curves", {}):
            pictures["training.png"] = Path(folder) / "training.png"
            plot_training([result], pictures["training.png"])
        run_id = tracking.record_run(
            home,
            experiment=tracking.EXPERIMENT,
            run_name=f"{result['model']} {result['method']} kept {result['kept']:g}",
            parameters=_parameters(result),
            metrics=_metrics(result),
            artifacts={
                CONFIG_FILE: config,
                "allocation.csv": allocation_table(model, stored),
                "allocation.png": picture,
                "result.json": json.dumps(result, indent=1, ensure_ascii=False),
                **pictures,
            },
            tags={"code_version": result["code_version"]},
            curves=curves,
        )
    registered = tracking.register_model(
        home,
        name=name,
        model_dir=Path(result["model_dir"]),
        run_id=run_id,
        tags=_tags(result),
    )
    return {"name": registered.name, "version": registered.version, "run_id": run_id}


def allocation_table(model: DenseModel, stored: Mapping[str, Mapping[str, Any]]) -> str:
    """CSV: a line per layer with its shape, rank (empty when dense), columns, entries and bits.

    The bits are those of its codes, or 16 where it has none; where they differ, all of them.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    sizes = ["rank", "columns", "entries", "parameters", "dense_parameters", "bits"]
    writer.writerow(["layer", "block", "out", "in", *sizes])
    for layer in model.layout.layers:
        own = stored[layer.name]
        writer.writerow(
            [
                *(layer.name, layer.block, layer.out_features, layer.in_features),
                *("" if own["rank"] is None else own["rank"], own["columns"], own["nonzeros"]),
                *(own["numbers"], layer.dense_cost, widths_of(own)),
            ]
        )
    return text.getvalue()


def widths_of(own: Mapping[str, Any]) -> str:
    """Bits of the numbers that a layer stores: "4", or "2 and 8"."""
    codes = own.get("entry", {}).get("codes", {})
    return " and ".join(map(str, sorted(set(codes.values())))) or str(FULL)


def _parameters(result: Mapping[str, Any]) -> dict[str, Any]:
    names = ("model", "method", "kept", "of", "seed", "code_version")
    options = {f"option.{name}": value for name, value in result["options"].items()}
    return {name: result[name] for name in names} | options


def _metrics(result: Mapping[str, Any]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for which, values in result["metrics"].items():
        for kind in ("texts", "tasks"):
            for label, numbers in values[kind].items():
                for metric, value in numbers.items():
                    metrics[f"{which}/{label}/{metric}"] = float(value)
        for name in ("perplexity", "kl"):
            if name in values:
                metrics[f"{which}/{name}"] = values[name]
    for name, value in result.get("learned", {}).items():
        metrics[f"learned/{name}"] = float(value)
    for group in ("parameters", "bytes", "memory"):
        for name, value in result[group].items():
            metrics[f"{group}/{name}"] = float(value)
    for stage in result["stages"]:
        for name in (f"seconds/{stage['name']}", f"{stage['state']}/{stage['name']}"):
            amount = stage["seconds"] if name.startswith("seconds") else 1.0
            metrics[name] = metrics.get(name, 0.0) + amount
    return metrics


def _tags(result: Mapping[str, Any]) -> dict[str, str]:
    tags = {
        "method": str(result["method"]),
        "kept": f"{result['kept']:g}",
        "seed": str(result["seed"]),
        "code_version": result["code_version"],
        "parameters": json.dumps(result["parameters"]),
        "bytes": json.dumps(result["bytes"]),
        "measured": json.dumps(result["measured"]),
    }
    for which, values in result["metrics"].items():
        for label, numbers in [*values["texts"].items(), *values["tasks"].items()]:
            tags[f"{which}.{label}"] = json.dumps(numbers)
        tags |= {f"{which}.{n}": f"{values[n]:.6g}" for n in ("perplexity", "kl") if n in values}
    return tags | _key_tags(result)


def _key_tags(result: Mapping[str, Any]) -> dict[str, str]:
    """Which artifacts a version was made from, by stage."""
    keys: dict[str, list[str]] = {}
    for stage in result["stages"]:
        keys.setdefault(stage["name"], []).append(stage["key"][:KEY_LENGTH])
    return {f"{tracking.KEY_TAG}{stage}": " ".join(found) for stage, found in keys.items()}


def same_version(home: Path, name: str, result: Mapping[str, Any]) -> tracking.Version | None:
    """The newest version made from the same artifacts as a result, with the same files and numbers.

    A newer library changes files of the folder (what serves it, its requirements) and no number.

    Args:
        home: Data directory.
        name: Name in the registry.
        result: A run's result, before it is registered.

    Raises:
        TrackingError: MLflow cannot be reached.
    """
    wanted = _key_tags(result)
    folder = Path(result["model_dir"]).resolve()
    alike = []
    for version in tracking.registered_versions(home):
        places = (folder.as_uri(), f"runs:/{version.run_id}/model")
        keys = {n: v for n, v in version.tags.items() if n.startswith(tracking.KEY_TAG)}
        if version.name == name and version.source in places and keys == wanted:
            alike.append(version)
    files = files_tag(folder)[FILES_TAG] if alike else ""  # gigabytes are read for it
    same = [version for version in alike if version.tags.get(FILES_TAG) == files]
    return same[-1] if same else None
