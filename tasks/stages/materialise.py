"""Stage ``materialise``: the factors become a HuggingFace model folder, kept in the store.

A run then publishes that folder where people look for it, as a copy: on a file system with reflinks
(btrfs, xfs) a copy shares its blocks until one of the two is changed.
"""

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from compress_core.folder.memory import expected_bytes
from compress_core.folder.swap import (
    SHARED,
    require_parts,
    settle_layers,
    shared_factors,
    swap_from_config,
)
from compress_core.folder.write import CompressedWeights, write_folder
from compress_core.forms.linear import CompressedLinear
from compress_core.hf.checkpoint import Checkpoint
from compress_core.layer.stored import BIAS, tensors_of
from storage.artifact import Artifact
from storage.copying import copy, share
from storage.disk import is_disk_full
from storage.errors import StorageError, StoreFullError, StorePermissionError
from storage.keys import recipe_key
from tasks.engine.cost import Cost
from tasks.engine.dense_model import FOLDER
from tasks.engine.job import Job
from tasks.engine.units import Unit
from tasks.engine.work import Group, Work
from tasks.stages.arrays import Stored

# What the modelling file that is written has and uses; nothing else names it.
WRITTEN = (
    CompressedLinear,
    swap_from_config,
    shared_factors,
    require_parts,
    settle_layers,
)


def materialise_group(job: Job, realised: Mapping[str, Unit]) -> Group:
    """The one unit that writes the folder.

    Args:
        job: What is done to which model.
        realised: Layer name to its ``realise`` unit.
    """
    model, layout = job.model, job.model.layout
    weights = {model.weight_key(layer.name) for layer in layout.layers}
    compressible = sum(layer.dense_cost for layer in layout.layers)
    per_number = model.nbytes / max(1, model.parameters)
    unit = Unit(
        "materialise",
        "model",
        settings={"layers": sorted(realised)},
        code=WRITTEN,
        sources={
            "configuration": model.config_digest,
            "tokenizer and other files": model.companions_digest,
            "weights outside layers": recipe_key(
                {key: digest for key, digest in model.stored.items() if key not in weights}
            ),
            "dense weights": recipe_key({key: model.stored[key] for key in sorted(weights)}),
        },
        inputs=dict(realised),
        cost=Cost(disk=int(model.nbytes - (1 - job.share) * compressible * per_number)),
    )
    return Group("materialise", "model", [unit], _Materialise(job, realised))


class _Materialise:
    def __init__(self, job: Job, realised: Mapping[str, Unit]) -> None:
        self.job = job
        self.realised = realised

    def __call__(self, work: Work) -> None:
        model, layout = self.job.model, self.job.model.layout
        with work.draft(work.missing[0]) as draft:
            summary = write_folder(
                draft.add_file(FOLDER),
                model.checkpoint,
                self._layers(work),
                layout,
            )
            stored = [int(work.artifact(unit).attrs["numbers"]) for unit in self.realised.values()]
            written = Checkpoint(summary.folder, compressed=summary.layers > 0)
            draft.attrs |= {
                "parameters": summary.parameters,
                "bytes": summary.nbytes,
                "compressible": sum(stored),
                "memory": {
                    "dense": expected_bytes(model.checkpoint),
                    "compressed": expected_bytes(written),
                },
            }

    def _layers(self, work: Work) -> Iterator[CompressedWeights]:
        job, layers = self.job, self.job.model.layout.layers
        for done, layer in enumerate(layers):
            record = Stored(work.artifact(self.realised[layer.name]))
            if record.attrs["rank"] is not None:
                owner, entry = job.owner(layer), record.attrs["entry"]
                tensors = tensors_of(record)
                bias = tensors.pop(BIAS, None)
                shared = {} if owner == layer.name else {SHARED: owner}
                yield CompressedWeights(layer.name, {**entry, **shared}, tensors, bias)
            work.progress(done + 1, len(layers))


@contextmanager
def publishing(artifact: Artifact, target: Path, link: bool = False) -> Iterator[Path]:
    """Puts the model folder of a ``materialise`` artifact at ``target``, replacing what is there.

    Yields a copy of it to add files to; it takes its place at once when the block ends, so that
    nobody sees a part of it, not even where two processes publish the same folder. What is copied
    is what the artifact's manifest names, whatever else lies beside it.

    Args:
        artifact: Holds the folder.
        target: Where it goes.
        link: Whether weight files are hard links into the store instead. Both ends are then one
            file, which is made read-only.

    Raises:
        StoreFullError, StorePermissionError: ``target`` cannot be written.
        StorageError: Files cannot be linked to there.
    """
    staging = target.with_name(f".{target.name}.{uuid4().hex[:8]}")
    try:
        staging.mkdir(parents=True)
        for name, source in artifact.files(FOLDER).items():
            place = staging / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if link and name.suffix == ".safetensors":
                share(source, place)
            else:
                copy(source, place)
        yield staging
        _take_place(staging, target)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise cannot_write(target, error) from error
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def cannot_write(target: Path, error: OSError) -> StorageError:
    """One line for a disk that is full or a place that may not be written."""
    if isinstance(error, StorageError):  # said already
        return error
    kept = "everything computed is kept: mend that and run the same command again"
    if is_disk_full(error) or os.strerror(errno.ENOSPC) in str(error):
        return StoreFullError(f"the disk is full: cannot write {target}; {kept}")
    return StorePermissionError(f"cannot write {target}: {error.strerror or error}; {kept}")


def publish(artifact: Artifact, target: Path) -> None:
    """Puts the model folder of an artifact at ``target`` as it is."""
    with publishing(artifact, target):
        pass


def _take_place(staging: Path, target: Path) -> None:
    while True:
        try:
            staging.rename(target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        old = target.with_name(f".{target.name}.{uuid4().hex[:8]}")
        with suppress(FileNotFoundError):  # another process was faster
            target.rename(old)
        shutil.rmtree(old, ignore_errors=True)
