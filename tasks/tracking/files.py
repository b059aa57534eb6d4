"""The files of a registered version: their digests then, and whether they still are the same."""

import hashlib
import json
from pathlib import Path

from tasks.tracking.speaking import TrackingError

FILES_TAG = "files"  # of a version: JSON, path inside the folder -> sha256
CONFIG_FILE = "eigenpress.yaml"  # in a model folder: what the run was asked for
LOADED_AS = "registered_model_meta"  # where MLflow notes in a folder which version it loaded it as
# No part of the model: what loading leaves, and the settings. Two runs that make the same model
# share its folder, and one of them may have measured more or used another batch size.
NOT_OF_MODEL = (LOADED_AS, "__pycache__", CONFIG_FILE)
NAMED = 3  # of the files that are not as they were


def folder_digests(folder: Path) -> dict[str, str]:
    """Path inside a folder, with ``/``, to the sha256 of the file there, 64 hex digits, sorted.

    Raises:
        OSError: A file cannot be read.
    """
    return {name: _digest(folder / name) for name in sorted(_names(folder))}


def files_tag(folder: Path) -> dict[str, str]:
    """The tag that says of a version what its files hold.

    Raises:
        TrackingError: A file cannot be read.
    """
    try:
        return {FILES_TAG: json.dumps(folder_digests(folder))}
    except OSError as error:
        raise TrackingError(f"cannot read {error.filename}: {error.strerror}") from error


def compare_files(folder: Path, recorded: str, what: str) -> None:
    """Makes sure that a folder holds the files that were recorded, and no others.

    Args:
        folder: The model folder.
        recorded: Value of the tag.
        what: Whose files they are, for the refusal: "m version 3".

    Raises:
        TrackingError: A file is absent, altered or added, or cannot be read; or the record is none.
    """
    try:
        before = json.loads(recorded)
        if not isinstance(before, dict):
            raise ValueError("no object")
    except ValueError as error:
        raise TrackingError(
            f"the tag {FILES_TAG!r} of {what} is no list of digests ({error}): register it again"
        ) from error
    now = _names(folder)
    found = [f"{name} is missing" for name in sorted(before.keys() - now)]
    found += [f"{name} was added" for name in sorted(now - before.keys())]
    try:
        both = sorted(now & before.keys())
        found += [f"{name} was altered" for name in both if _digest(folder / name) != before[name]]
    except OSError as error:
        raise TrackingError(f"cannot read {error.filename}: {error.strerror}") from error
    if found:
        more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
        raise TrackingError(
            f"{folder} is not what was registered as {what}: {', '.join(found[:NAMED])}{more}; "
            "the command that made it writes and registers it again"
        )


def _names(folder: Path) -> set[str]:
    files = (file for file in folder.rglob("*") if file.is_symlink() or not file.is_dir())
    inside = [file.relative_to(folder) for file in files]
    return {file.as_posix() for file in inside if not {*file.parts} & {*NOT_OF_MODEL}}


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
