"""`eigenpress export`: which folder goes where, checked before anything is read."""

import os
from pathlib import Path

from compress_core.errors import ConfigError
from storage.disk import writing

FORMS = ("dense", "vllm")


def export_folder(folder: Path, to: str, output: Path | None) -> Path:
    """Turns a compressed folder into another form.

    Args:
        folder: The compressed model's.
        to: One of ``FORMS``.
        output: Folder to write; else one beside it, named after it.

    Returns:
        The folder that was written.

    Raises:
        ConfigError: The two folders will not do.
        ModelError: The folder is no compressed model, or the other one is in use.
        StorageError: The other one cannot be written.
    """
    if to not in FORMS:
        raise ConfigError(f"cannot export to {to!r}; forms: {', '.join(FORMS)}")
    source, target = export_paths(folder, to, output)
    from compress_core.folder.export import to_dense
    from compress_core.folder.for_vllm import to_vllm

    with writing(target):
        (to_dense if to == "dense" else to_vllm)(source, target)
    return target


def export_paths(folder: Path, to: str, output: Path | None) -> tuple[Path, Path]:
    """The folder to read and the one to write, as absolute paths.

    Raises:
        ConfigError: One of them cannot be, or the second lies in the first.
    """
    from flows.settings.output import check_name

    # by their text: `.` and `..` have no name of their own, and a link is named as its folder is
    source = Path(os.path.abspath(folder.expanduser()))
    with_name = source.resolve().name
    if not with_name:
        raise ConfigError(f"cannot export {source}: it is no model folder")
    if output is None:
        target = source.with_name(f"{with_name}-{to}")
    else:
        target = Path(os.path.abspath(output.expanduser()))
    check_name(target, "--output")
    try:
        if source.is_file():
            raise ConfigError(f"{source} is a file; name the folder of a compressed model")
        if target.resolve().is_relative_to(source.resolve()):
            raise ConfigError(f"--output {target} lies in the folder that is exported")
        if target.exists() and not target.is_dir():
            raise ConfigError(f"--output {target} is a file; name a folder")
    except (OSError, RuntimeError) as error:  # a name too long, links in a circle
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"cannot export {source} to {target}: {reason}") from None
    return source, target
