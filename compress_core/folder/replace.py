"""A model folder again with other values in some of its tensors; nothing else about it changes."""

import shutil
import struct
from collections.abc import Callable, Collection
from pathlib import Path

from torch import Tensor

from compress_core.errors import ModelError
from compress_core.folder.shards import new_folder
from compress_core.folder.spool import raw_bytes
from compress_core.hf.checkpoint import DTYPES, tensor_headers, weight_files


def write_replaced(
    source: Path, target: Path, keys: Collection[str], read: Callable[[str], Tensor]
) -> None:
    """Copies a model folder with some tensors replaced, one of them in memory at a time.

    Args:
        source: The folder; it is only read.
        target: The folder to make; it must not exist, or be empty.
        keys: Keys of the tensors that are replaced.
        read: Gives the new tensor of a key, of the same shape and dtype.

    Raises:
        ModelError: A key is not in the folder, a tensor does not fit, or ``target`` is in use.
    """
    files = weight_files(source)
    headers = {file.name: tensor_headers(file) for file in files}
    if unknown := sorted(set(keys).difference(*headers.values())):
        raise ModelError(f"{source} has no tensor {unknown[0]} to replace")
    with new_folder(target) as folder:
        shutil.copytree(source, folder, copy_function=shutil.copyfile, dirs_exist_ok=True)
        for name, tensors in headers.items():
            with (folder / name).open("rb+") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                for key in tensors.keys() & set(keys):
                    new, old = read(key), tensors[key]
                    if [list(new.shape), new.dtype] != [old["shape"], DTYPES[old["dtype"]]]:
                        raise ModelError(
                            f"{key} is {tuple(old['shape'])} {old['dtype']}; {tuple(new.shape)} "
                            f"{new.dtype} cannot take its place"
                        )
                    file.seek(8 + length + old["data_offsets"][0])
                    file.write(raw_bytes(new))
