"""Where a run's model folder goes, and the refusal to replace what Eigenpress did not write.

Asked before any stage runs and again just before the folder takes its place.
"""

import os
from pathlib import Path

from compress_core.errors import ConfigError
from compress_core.hf.companions import companion_files
from compress_core.hf.modelling import MODELLING_FILE
from flows.settings.config import RunConfig, read_yaml

CONFIG_FILE = "eigenpress.yaml"


def check_output(config: RunConfig, model: Path) -> None:
    """Refuses an ``--output`` that cannot be written or holds anything but an earlier run's folder.

    Args:
        config: The run, with absolute paths.
        model: Folder of the dense model.

    Raises:
        ConfigError: The folder is not ours to replace, or there is no way to write it.
    """
    target = config.output
    if target is None:
        return
    if target.exists() and not target.is_dir():
        raise ConfigError(f"--output {target} is a file; name a folder")
    above = next(folder for folder in (target, *target.parents) if folder.exists())
    if target == Path(target.anchor) or not above.is_dir():
        raise ConfigError(f"--output {target} cannot be a folder; choose another")
    if target == model.resolve() or any(target.iterdir() if target.is_dir() else ()):
        _refuse_foreign(target, model)
    place = target.parent if target.exists() else above
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"--output {target}: no permission to write in {place}")


def _refuse_foreign(target: Path, model: Path) -> None:
    settings = target / CONFIG_FILE
    ours = (
        target != model.resolve()
        and settings.is_file()
        and read_yaml(settings).get("output") == str(target)
    )
    if not ours:
        raise ConfigError(
            f"--output {target} is not empty and no earlier run wrote it there, so it is not "
            "replaced; choose another folder"
        )
    known = {settings, target / "config.json", target / MODELLING_FILE}
    known |= {*companion_files(target), *target.glob("model*.safetensors*")}
    for file in sorted(target.rglob("*")):
        if file.is_file() and file not in known and file.suffix != ".pyc":
            raise ConfigError(
                f"--output {target} holds {file.relative_to(target)}, which no run wrote there and "
                "which would be lost: move it away, or choose another folder"
            )
