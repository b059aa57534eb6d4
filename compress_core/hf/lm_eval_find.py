"""Finds lm-eval tasks: by name, in a folder or among lm-eval's own, or by the path of a YAML.

The content of everything local that a task reads is part of what the task is.
"""

import difflib
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from compress_core.errors import ConfigError
from compress_core.hf.lm_eval_code import code_files, forget, named_files
from compress_core.hf.lm_eval_data import (
    anchored,
    file_digest,
    identity,
    local_data,
    with_own_cache,
)
from compress_core.hf.lm_eval_watch import Watch, watching
from compress_core.hf.refusing import refusing


@dataclass(frozen=True)
class TaskSpec:
    """One name the user asked for: a task, or a tag or group of several.

    Attributes:
        name: As lm-eval calls it.
        configs: Every YAML configuration behind it, by name; data files are absolute, functions
            resolved.
        files: Local files beside the data that decide its numbers: modules, what they import and
            open, what configurations name.
        programs: What reading its files started, so that nobody knows what was read.
        manager: lm-eval's index, from which the task is built when it runs.
    """

    name: str
    configs: Mapping[str, Mapping[str, Any]]
    files: frozenset[Path] = field(repr=False)
    programs: frozenset[str] = field(repr=False)
    manager: Any = field(repr=False, compare=False)

    @functools.cached_property
    def digest_parts(self) -> dict[str, Any]:
        """What decides the task's numbers, ready for JSON: configuration, code, data, lm-eval.

        Local files count by content, not by path. A dataset of the hub counts by its name and the
        revision in the configuration, if any.
        """
        configs = {name: identity(config) for name, config in sorted(self.configs.items())}
        files = sorted([file.name, file_digest(file)] for file in self.files)
        version = metadata.version("lm_eval")
        return {"name": self.name, "configs": configs, "files": files, "lm_eval": version}

    def unknown(self, watch: Watch) -> list[str]:
        """What was read while the task ran that is in no digest, and programs that were started."""
        known = {file.resolve() for file in self.files}
        known |= {file.resolve() for file in local_data(self.configs)}
        files = sorted(str(file) for file in watch.files() - known)
        return files + sorted(self.programs | watch.programs())

    def fixed_shots(self) -> list[str]:
        """The tasks in it that say themselves that they are asked without examples."""
        return [name for name, config in self.configs.items() if config.get("num_fewshot") == 0]


def find_tasks(names: Sequence[str], task_path: Path | None = None) -> list[TaskSpec]:
    """Looks the names up, in the folder first, then among lm-eval's own tasks (6 to 11 seconds).

    Args:
        names: Tasks, tags or groups, or paths of YAML files.
        task_path: Folder of YAML files, searched with its subfolders.

    Raises:
        ConfigError: A name or file that does not exist (with the nearest names), cannot be read,
            or names data that is not there.
    """
    local = None
    if task_path is not None:
        if not task_path.is_dir():
            raise ConfigError(f"task folder {task_path} does not exist; check the path")
        local = _index(task_path)
    specs = []
    for name in dict.fromkeys(names):
        if is_path(name):
            specs.append(_spec(*_of_file(name)))
        elif local is not None and name in local.task_index:
            specs.append(_spec(name, local))
        else:
            own = _own_tasks()
            if name not in own.task_index:
                raise ConfigError(_unknown(name, own, local, task_path))
            specs.append(_spec(name, own))
    found = [spec.name for spec in specs]
    twice = next((name for name in found if found.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"two of the tasks asked for are called {twice!r}; rename one")
    return specs


def is_path(task: str) -> bool:
    """Whether a task is asked for by the path of its YAML."""
    return task.lower().endswith((".yaml", ".yml")) or task.startswith((".", "/", "~"))


def _index(folder: Path | None) -> Any:
    """lm-eval's index of the tasks in a folder, or one of none."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder) if folder else None, include_defaults=False)


@functools.cache
def _own_tasks() -> Any:
    """lm-eval's index of its own tasks, made once in a process: that is what takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _of_file(name: str) -> tuple[str, Any]:
    """The name of the task or group in a YAML file, and an index that holds it."""
    from lm_eval.tasks._index import TaskIndex
    from lm_eval.tasks._yaml_loader import load_yaml

    file = Path(name).expanduser().absolute()
    if file.is_dir():
        raise ConfigError(f"task {name} is a folder: give the path of a YAML, or --task-path")
    if not file.is_file():
        raise ConfigError(f"task file {name} does not exist; check the path")
    entries: dict[str, Any] = {}
    with refusing(ConfigError, f"task file {name} is no task of lm-eval"):
        config = load_yaml(file, resolve_func=False)
        TaskIndex.process_cfg(config, file, entries)
        called = config.get("group") or config["task"]
    # A group's members lie beside it; a task needs nobody, and its folder may hold anything.
    index = _index(file.parent if "group" in config else None)
    index.task_index.update(entries)
    return called, index


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


@dataclass
class _Seen:
    """What reading one YAML has shown."""

    folder: Path
    modules: set[Path]
    watch: Watch = field(default_factory=Watch)


_seen: WeakKeyDictionary[Any, dict[str, _Seen]] = WeakKeyDictionary()  # by index and task


def _spec(name: str, manager: Any) -> TaskSpec:
    seen = _seen.setdefault(manager, {})
    configs: dict[str, dict[str, Any]] = {}
    waiting = [name]
    while waiting:
        current = waiting.pop()
        entry = _entry(current, manager) if current not in configs else None
        if entry is None:
            continue
        if entry.yaml_path is not None:
            file = entry.yaml_path.resolve()
            seen[current] = _Seen(file.parent, _modules(entry.cfg))
            forget(seen[current].modules)
            with watching(seen[current].watch):
                # lm-eval takes this one when there is no file to read again.
                entry.cfg = _read(file, current)
            entry.yaml_path = None
        configs[current] = entry.cfg or {}
        waiting += _members(entry.cfg) if entry.cfg else sorted(entry.tags)
    found = [seen[current] for current in configs if current in seen]
    files, programs = _files_of(configs, found)
    spec = TaskSpec(name, configs, frozenset(files), frozenset(programs), manager)
    parts = json.dumps(spec.digest_parts, sort_keys=True)
    key = hashlib.sha256(parts.encode()).hexdigest()[:16]
    for current in configs:
        entry = manager.task_index[current]
        entry.cfg = with_own_cache(entry.cfg, key) if entry.cfg else entry.cfg
    return spec


def _files_of(
    configs: Mapping[str, Mapping[str, Any]], seen: Sequence[_Seen]
) -> tuple[set[Path], set[str]]:
    """The files beside the data that decide a task, and the programs that its modules started."""
    modules = {module for one in seen for module in one.modules}
    functions = [leaf for leaf in _leaves(configs) if callable(leaf)]
    files = code_files(functions, modules)
    programs: set[str] = set()
    for one in seen:
        files |= named_files(_texts(configs), one.folder)
        if one.modules:
            opened = one.watch.files()
            files |= {file for file in opened if file.suffix not in (".yaml", ".yml")}
            programs |= one.watch.programs()
    return files - {file.resolve() for file in local_data(configs)}, programs


def _modules(config: Any) -> set[Path]:
    """The local modules whose functions an unresolved configuration names."""
    found = set()
    for text in _texts(config):
        # lm-eval's form of `!function utils.name` is /FOLDER/utils.name.
        folder, _, name = text.rpartition("/")
        module = name.rpartition(".")[0].replace(".", "/")
        if text.startswith("/") and module and "\n" not in text:
            with suppress(OSError, ValueError):
                file = Path(folder) / f"{module}.py"
                found |= {file.resolve()} if file.is_file() else set()
    return found


def _entry(name: str, manager: Any) -> Any:
    """What the index holds under a name; a member of a local group may be one of lm-eval's own."""
    index = manager.task_index
    if name not in index and (own := _own_tasks().task_index.get(name)) is not None:
        index[name] = own
    return index.get(name)


def _read(file: Path, task: str) -> Any:
    from lm_eval.tasks._yaml_loader import load_yaml

    with refusing(ConfigError, f"task {task}: {file}"):
        config = load_yaml(file, resolve_func=True)
    return anchored(config, file.parent, task)


def _texts(value: Any) -> Iterator[str]:
    return (leaf for leaf in _leaves(value) if isinstance(leaf, str))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, list | tuple):
        yield value
        return
    for item in value:
        yield from _leaves(item)


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
