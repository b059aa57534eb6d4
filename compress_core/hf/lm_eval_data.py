"""The local data of an lm-eval task: where its YAML means it to be, and its content.

lm-eval resolves relative paths against the working directory; here they belong to the folder of
their YAML, where they are there.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from compress_core.errors import ConfigError
from compress_core.hf.lm_eval_watch import scratch

_PLACES = ("dataset_path", "dataset_kwargs")  # keys whose values may be paths
_CACHE = "cache_dir"


def anchored(value: Any, folder: Path, task: str) -> Any:
    """A configuration whose local data, at any depth, is named by absolute paths.

    Raises:
        ConfigError: Data that is named is not there.
    """
    if isinstance(value, list):
        return [anchored(item, folder, task) for item in value]
    if not isinstance(value, dict):
        return value
    value = {key: anchored(item, folder, task) for key, item in value.items()}
    path = value.get("dataset_path")
    if not isinstance(path, str) or value.get("custom_dataset"):
        return value
    settings = dict(value.get("dataset_kwargs") or {})
    packaged = path in _packaged()
    base = folder
    if not packaged:
        local = _local(folder, path)
        if local is None and path.startswith(("/", ".", "~")):
            raise ConfigError(
                f"task {task}: data {folder / path} does not exist; check dataset_path"
            )
        if local is None:
            return value  # a dataset of the hub, and what it is asked for
        value["dataset_path"], base = str(local), local
    if isinstance(settings.get("data_dir"), str) and "://" not in settings["data_dir"]:
        base = _existing(base, settings["data_dir"], task, "data_dir")
        settings["data_dir"] = str(base)
    if "data_files" in settings:
        settings["data_files"] = _files(settings["data_files"], base, task)
    if settings or not packaged:
        value["dataset_kwargs"] = settings
    return value


def _packaged() -> Mapping[str, Any]:
    """The `dataset_path`s that mean kinds of files, not a dataset."""
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    return _PACKAGED_DATASETS_MODULES


def _local(folder: Path, name: str) -> Path | None:
    """A path below the YAML's folder, or below the working directory, where it exists."""
    for path in (folder / Path(name).expanduser(), Path(name).absolute()):
        if path.exists():
            return path.resolve()
    return None


def _existing(base: Path, name: str, task: str, key: str) -> Path:
    path = _local(base, name)
    if path is None:
        raise ConfigError(f"task {task}: data {base / name} does not exist; check {key}")
    return path


def _files(files: Any, base: Path, task: str) -> Any:
    if isinstance(files, dict):
        return {split: _files(item, base, task) for split, item in files.items()}
    if isinstance(files, list | tuple):
        return [_files(item, base, task) for item in files]
    if not isinstance(files, str) or "://" in files:
        return files
    for path in (base / Path(files).expanduser(), Path(files).absolute()):
        if matching(path):
            return str(path)
    path = base / Path(files).expanduser()
    raise ConfigError(f"task {task}: data file {path} does not exist; check data_files")


def matching(path: Path) -> list[Path]:
    """The files that an absolute path, a folder or a glob pattern stands for."""
    if path.is_file():
        return [path]
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    found = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
    return [file for place in found for file in ([place] if place.is_file() else matching(place))]


def local_data(value: Any, inside: bool = False) -> Iterator[Path]:
    """The files and folders that an anchored configuration names as its data."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key != _CACHE:
                yield from local_data(item, inside or key in _PLACES)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from local_data(item, inside)
    elif inside and isinstance(value, str) and Path(value).is_absolute():
        yield from matching(Path(value))


def identity(value: Any, inside: bool = False) -> Any:
    """A configuration as JSON, with local data by its content in place of its path."""
    if isinstance(value, Mapping):
        return {
            str(key): identity(item, inside or key in _PLACES)
            for key, item in value.items()
            if key != _CACHE
        }
    if isinstance(value, list | tuple):
        return [identity(item, inside) for item in value]
    if inside and isinstance(value, str) and Path(value).is_absolute():
        root = Path(value)
        return [
            [file.relative_to(root).as_posix() if root.is_dir() else "", file_digest(file)]
            for file in matching(root)
        ]
    if callable(value):
        return {"function": getattr(value, "__qualname__", type(value).__qualname__)}
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def with_own_cache(value: Any, key: str) -> Any:
    """The configuration with a cache for its local data that other content does not share."""
    if isinstance(value, list):
        return [with_own_cache(item, key) for item in value]
    if not isinstance(value, dict):
        return value
    value = {name: with_own_cache(item, key) for name, item in value.items()}
    if any(True for _ in local_data(value)) and isinstance(value.get("dataset_path"), str):
        settings = value.get("dataset_kwargs") or {}
        value["dataset_kwargs"] = {**settings, _CACHE: str(scratch() / key)}
    return value


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
