"""What a command line means by a model: a folder, or a version of the registry."""

from pathlib import Path

from compress_core.errors import ConfigError
from tasks.tracking.client import Version
from tasks.tracking.speaking import TrackingError
from tasks.tracking.versions import find_version, model_folder

PATH_STARTS = ("/", "./", "../", "~")


def folder_or_version(text: str, home: Path) -> tuple[Path, Version | None]:
    """The folder of a model, and the registered version that it is, if one was asked for.

    What begins as a path does, or exists as a folder, is a folder; anything else is ``NAME``
    (its newest version), ``NAME@ALIAS`` or ``NAME/NUMBER``.

    Args:
        text: What somebody wrote.
        home: The data directory, whose registry is asked.

    Raises:
        ConfigError: There is neither.
        TrackingError: The version's files are gone, or MLflow cannot be reached.
    """
    folder = _as_folder(text)
    if folder is not None:
        return folder, None
    try:
        version = find_version(home, text)
    except TrackingError as error:
        raise ConfigError(f"there is no folder {text!r}, and {error}") from error
    return model_folder(home, version), version


def _as_folder(text: str) -> Path | None:
    try:
        path = Path(text).expanduser()
        there, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such user, a null byte
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{text!r} names no model: {reason}") from None
    if text and there:
        return path
    if is_file:
        raise ConfigError(f"{text} is a file; name the folder of a model, or a registered version")
    if text in (".", "..") or text.startswith(PATH_STARTS):
        raise ConfigError(f"there is no folder {text}")
    return None
