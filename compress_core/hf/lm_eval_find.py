"""Finds lm-eval tasks by name, in a folder of local YAML files or among lm-eval's own.

lm-eval resolves relative data files against the working directory; here they belong to the folder
of their YAML, and their content is part of what a task is.
"""

import difflib
import functools
import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from compress_core.errors import ConfigError

_FILE_LOADERS = frozenset({"json", "csv", "parquet", "text", "arrow"})
"""The `dataset_path`s that mean files given by `data_files`, not a dataset of the hub."""


@dataclass(frozen=True)
class TaskSpec:
    """One name the user asked for: a task, or a tag or group of several.

    Attributes:
        name: As asked for.
        configs: Every YAML configuration behind it, by name; data files are absolute, functions
            resolved.
        manager: lm-eval's index, from which the task is built when it runs.
    """

    name: str
    configs: Mapping[str, Mapping[str, Any]]
    manager: Any = field(repr=False, compare=False)

    def digest_parts(self) -> dict[str, Any]:
        """What decides the task's numbers, ready for JSON: configuration, code, data, lm-eval.

        Local data files and the modules of functions count by content, not by path. A dataset of
        the hub counts by its name and the revision in the configuration, if any.
        """
        configs = {name: _identity(config) for name, config in sorted(self.configs.items())}
        return {"name": self.name, "configs": configs, "lm_eval": metadata.version("lm_eval")}


def find_tasks(names: Sequence[str], task_path: Path | None = None) -> list[TaskSpec]:
    """Looks the names up, in the folder first, then among lm-eval's own tasks (6 to 11 seconds).

    Args:
        names: Tasks, tags or groups.
        task_path: Folder of YAML files, searched with its subfolders.

    Raises:
        ConfigError: A name that does not exist (with the nearest ones), or a missing data file.
    """
    from lm_eval.tasks import TaskManager

    local = None
    if task_path is not None:
        if not task_path.is_dir():
            raise ConfigError(f"task folder {task_path} does not exist; check the path")
        local = TaskManager(include_path=str(task_path), include_defaults=False)
    specs = []
    for name in names:
        if local is not None and name in local.task_index:
            specs.append(_spec(name, local))
            continue
        own = _own_tasks()
        if name not in own.task_index:
            raise ConfigError(_unknown(name, own, local, task_path))
        specs.append(_spec(name, own))
    return specs


@functools.cache
def _own_tasks() -> Any:
    """lm-eval's index of its own tasks, made once in a process: that is what takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _unknown(name: str, own: Any, local: Any, folder: Path | None) -> str:
    import yaml
    from lm_eval.tasks._yaml_loader import load_yaml

    known = [*(local.all_tasks if local else ()), *own.all_tasks]
    near = difflib.get_close_matches(name, known, n=3) or (local.all_tasks[:5] if local else [])
    message = f"no lm-eval task is called {name!r}"
    if near:
        message += f"; nearest: {', '.join(near)}"
    # lm-eval leaves out a file it cannot read without a word: it may be the one that was meant.
    for path in sorted(folder.rglob("*.yaml")) if folder else []:
        try:
            load_yaml(path, resolve_func=False)
        except (OSError, ValueError, yaml.YAMLError) as error:
            message += f"; {path} cannot be read: {' '.join(str(error).split())}"
    return message


def _spec(name: str, manager: Any) -> TaskSpec:
    from lm_eval.tasks._yaml_loader import load_yaml

    configs: dict[str, dict[str, Any]] = {}
    waiting = [name]
    while waiting:
        current = waiting.pop()
        entry = manager.task_index.get(current)
        if entry is None or current in configs:
            continue
        if entry.yaml_path is not None:
            try:
                config = load_yaml(entry.yaml_path, resolve_func=True)
            except (ImportError, AttributeError, ValueError, OSError) as error:
                raise ConfigError(f"task {current}: {entry.yaml_path}: {error}") from error
            # lm-eval takes this one when there is no file to read again.
            entry.cfg = _anchored(config, entry.yaml_path.resolve().parent, current)
            entry.yaml_path = None
        configs[current] = entry.cfg or {}
        waiting += _members(entry.cfg) if entry.cfg else sorted(entry.tags)
    return TaskSpec(name, configs, manager)


def _members(config: Mapping[str, Any]) -> list[str]:
    """Names a group's configuration refers to; a task's refers to none."""
    if not isinstance(config.get("task"), list):
        return []
    found = []
    for item in config["task"]:
        if isinstance(item, str):
            found.append(item)
        else:
            found += [item[key] for key in ("group", "task") if isinstance(item.get(key), str)]
            found += _members(item)
    return found


def _anchored(value: Any, folder: Path, task: str) -> Any:
    """A configuration whose relative local data files, at any depth, are made absolute."""
    if isinstance(value, list):
        return [_anchored(item, folder, task) for item in value]
    if not isinstance(value, dict):
        return value
    value = {key: _anchored(item, folder, task) for key, item in value.items()}
    settings = value.get("dataset_kwargs") or {}
    if value.get("dataset_path") in _FILE_LOADERS and "data_files" in settings:
        files = _absolute(settings["data_files"], folder, task)
        value["dataset_kwargs"] = {**settings, "data_files": files}
    return value


def _absolute(files: Any, folder: Path, task: str) -> Any:
    if isinstance(files, dict):
        return {split: _absolute(item, folder, task) for split, item in files.items()}
    if isinstance(files, list):
        return [_absolute(item, folder, task) for item in files]
    if "://" in files:
        return files
    path = folder / Path(files).expanduser()
    if not _matching(path):
        raise ConfigError(f"task {task}: data file {path} does not exist; check data_files")
    return str(path)


def _matching(path: Path) -> list[Path]:
    """The files an absolute path or glob pattern stands for."""
    if path.is_file():
        return [path]
    return sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))


def _identity(value: Any, inside_files: bool = False) -> Any:
    if isinstance(value, Mapping):
        return {
            str(key): _identity(item, inside_files or key == "data_files")
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_identity(item, inside_files) for item in value]
    if isinstance(value, str) and inside_files and Path(value).is_absolute():
        return [_file_digest(path) for path in _matching(Path(value))]
    if callable(value):
        source = inspect.getsourcefile(inspect.unwrap(value))
        name = getattr(value, "__qualname__", type(value).__qualname__)
        return {"function": name, "source": _file_digest(Path(source)) if source else None}
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
