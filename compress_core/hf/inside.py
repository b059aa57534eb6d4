"""Files of a model are inside its folder, and its JSON is an object; else there is a ModelError."""

import json
from pathlib import Path
from typing import Any

from compress_core.errors import ModelError


def inside(folder: Path, file: Path) -> Path:
    """The same file, if it is where it says it is.

    In the hub's cache every file of a snapshot links to the repository's blobs, which are inside.

    Args:
        folder: The model folder.
        file: A path below it, which may be a link.

    Raises:
        ModelError: It lies, or leads, out of the folder.
    """
    real, home = file.resolve(), folder.resolve()
    places = [home]
    repository = home.parent.parent
    if home.parent.name == "snapshots" and repository.name.startswith("models--"):
        places.append(repository / "blobs")
    if not any(real.is_relative_to(place) for place in places):
        raise ModelError(
            f"{file} is outside its model's folder, at {real}: files of a model are inside its "
            "folder, so nothing else is read or copied; put the file itself there"
        )
    return file


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ModelError: The file is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError too
        raise ModelError(f"{path} is not readable JSON ({error}): get the model again") from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}, not an object: get it again")
    return content
