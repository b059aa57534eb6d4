"""Where a run's model folder goes, and the refusal to replace what Eigenpress did not write.

Asked before any stage runs and again just before the folder takes its place.
"""

import os
import tempfile
from pathlib import Path

from compress_core.errors import ConfigError
from compress_core.folder.modelling import MODELLING_FILE
from compress_core.hf.companions import companion_files
from flows.settings.config import RunConfig
from flows.settings.reading import read_yaml
from tasks.tracking.files import CARD_FILE, CONFIG_FILE, LOADED_AS
from tasks.tracking.package import PACKAGE_FILES

LONGEST_NAME = 230  # bytes: the folder is written under its name with a few letters around it


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
    check_name(target, "--output")
    if target.exists() and not target.is_dir():
        raise ConfigError(f"--output {target} is a file; name a folder")
    above = next(folder for folder in (target, *target.parents) if folder.exists())
    if target == Path(target.anchor) or not above.is_dir():
        raise ConfigError(f"--output {target} cannot be a folder; choose another")
    if target == model.resolve() or any(target.iterdir() if target.is_dir() else ()):
        _refuse_foreign(target, model)
    if config.link and above.stat().st_dev != config.home.stat().st_dev:
        raise ConfigError(
            f"--link: --output {target} is on another disk than the data directory {config.home}: "
            "leave one of the two out, or choose a folder on that disk"
        )
    check_place("--output", target, model, config.home)
    _try_to_write(target, target.parent if target.exists() else above)


def check_place(flag: str, target: Path, model: Path, home: Path | None = None) -> None:
    """Refuses a place inside the model's folder, or among what Eigenpress keeps for itself.

    Args:
        flag: What names the place, for the message.
        target: The place.
        model: Folder of a model that is read.
        home: Data directory; only its ``models`` and ``reports`` are people's.

    Raises:
        ConfigError: It is there.
    """
    if target.resolve().is_relative_to(model.resolve()):
        raise ConfigError(f"{flag} {target} is inside the model's folder; choose another place")
    home = home and home.expanduser().resolve()
    if home is None or not target.resolve().is_relative_to(home):
        return
    if not any(target.resolve().is_relative_to(home / place) for place in ("models", "reports")):
        raise ConfigError(
            f"{flag} {target} is inside the data directory, which holds what Eigenpress keeps for "
            "itself; choose another place"
        )


def _try_to_write(target: Path, place: Path) -> None:
    """Makes a folder of the name under which ``target`` will be made, and removes it."""
    try:
        os.rmdir(tempfile.mkdtemp(prefix=f".{target.name}.", dir=place))
    except OSError as error:
        raise ConfigError(
            f"--output {target}: no permission to write in {place}"
            if isinstance(error, PermissionError)
            else f"--output {target} cannot be made in {place}: {error.strerror}"
        ) from None


def check_name(target: Path, flag: str) -> None:
    """Refuses a folder's name that no file system takes.

    Raises:
        ConfigError: It is too long.
    """
    length = len(os.fsencode(target.name))
    if length > LONGEST_NAME:
        raise ConfigError(f"{flag} ends in a name of {length} bytes; at most {LONGEST_NAME} do")
    try:
        target.exists()
    except OSError as error:
        raise ConfigError(f"{flag} {target}: {error.strerror}") from None


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
    known |= {target / name for name in (*PACKAGE_FILES, LOADED_AS, CARD_FILE)}
    known |= {*companion_files(target), *target.glob("model*.safetensors*")}
    for file in sorted(target.rglob("*")):
        if file.is_file() and file not in known and file.suffix != ".pyc":
            raise ConfigError(
                f"--output {target} holds {file.relative_to(target)}, which no run wrote there and "
                "which would be lost: move it away, or choose another folder"
            )
