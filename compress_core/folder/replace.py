"""A model folder again with other values in some of its tensors; nothing else about it changes."""

import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from compress_core.errors import ModelError
from compress_core.folder.shards import new_folder
from compress_core.hf.checkpoint import tensor_headers, weight_files


def write_replaced(
    source: Path, target: Path, keys: Collection[str], read: Callable[[str], Tensor]
) -> None:
    """Copies a model folder with some tensors replaced, one weight file in memory at a time.

    Args:
        source: The folder; it is only read.
        target: The folder to make; it must not exist, or be empty.
        keys: Keys of the tensors that are replaced.
        read: Gives the new tensor of a key, of the same shape and dtype.

    Raises:
        ModelError: A key is not in the folder, a tensor does not fit, or ``target`` is in use.
    """
    files = weight_files(source)
    known = {key for file in files for key in tensor_headers(file)}
    if unknown := sorted(set(keys) - known):
        raise ModelError(f"{source} has no tensor {unknown[0]} to replace")
    with new_folder(target) as folder:
        names = {file.name for file in files}
        shutil.copytree(
            source,
            folder,
            dirs_exist_ok=True,
            ignore=lambda where, found: names.intersection(found),
        )
        for file in files:
            _write_file(file, folder / file.name, keys, read)


def _write_file(
    source: Path, target: Path, keys: Collection[str], read: Callable[[str], Tensor]
) -> None:
    tensors = {}
    with safe_open(source, framework="pt") as stored:
        metadata = stored.metadata()
        for key in stored.keys():  # noqa: SIM118  it is no mapping
            old = stored.get_tensor(key)
            new = read(key) if key in keys else old
            if (new.shape, new.dtype) != (old.shape, old.dtype):
                raise ModelError(
                    f"{key} is {tuple(old.shape)} {old.dtype}; {tuple(new.shape)} {new.dtype} "
                    "cannot take its place"
                )
            tensors[key] = new.contiguous()
    save_file(tensors, target, metadata=metadata)
