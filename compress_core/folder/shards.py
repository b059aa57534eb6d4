"""Write tensors into safetensors files of bounded size, in a folder that appears when complete.

No more than one tensor is held in memory, and a folder under its final name is whole: a process
that dies leaves a hidden `.partial` folder behind, never half a model.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from compress_core.errors import ModelError
from compress_core.folder.spool import Spool
from compress_core.hf.checkpoint import INDEX_FILE, SINGLE_FILE

SHARD_BYTES = 5_000_000_000


class ShardWriter:
    """Writes tensors as they come, and begins a new shard whenever one is full."""

    def __init__(self, folder: Path, max_shard_bytes: int) -> None:
        """Write into `folder`, with at most `max_shard_bytes` a file (a tensor is never cut)."""
        self._folder = folder
        self._max = max_shard_bytes
        self._spool: Spool | None = None
        self._shards: list[list[str]] = []
        self._nbytes = 0
        self._parameters = 0

    def add(self, key: str, tensor: Tensor) -> None:
        """Take one tensor to be stored under `key`."""
        if self._spool is not None and self._spool.nbytes + tensor.nbytes > self._max:
            self._flush(self._spool)
        if self._spool is None:
            self._spool = Spool(self._part(len(self._shards)))
        self._spool.add(key, tensor)
        self._nbytes += tensor.nbytes
        self._parameters += tensor.numel()

    def close(self) -> tuple[str, ...]:
        """Write what is left, give the files their final names, and return these."""
        self._flush(self._spool or Spool(self._part(len(self._shards))))
        total = len(self._shards)
        if total == 1:
            self._part(0).rename(self._folder / SINGLE_FILE)
            return (SINGLE_FILE,)
        files = tuple(f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total))
        for i, file in enumerate(files):
            self._part(i).rename(self._folder / file)
        pairs = zip(files, self._shards, strict=True)
        index = {
            "metadata": {"total_parameters": self._parameters, "total_size": self._nbytes},
            "weight_map": {key: file for file, keys in pairs for key in keys},
        }
        write_json(self._folder / INDEX_FILE, index)
        return files

    def _part(self, i: int) -> Path:
        return self._folder / f"part-{i:05d}.safetensors"

    def _flush(self, spool: Spool) -> None:
        spool.close()
        self._shards.append(spool.keys)
        self._spool = None


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name `target` when the block ends well, and goes if not.

    Raises:
        ModelError: `target` is there already and not an empty folder.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelError(f"{target} exists and is not empty: remove it or choose another folder")
    draft = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.partial"
    draft.mkdir(parents=True)
    try:
        yield draft
        os.replace(draft, target)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object as transformers does, keys sorted, so that equal ones are equal files."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
