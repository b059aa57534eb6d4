"""Stage ``materialise``: the factors become a HuggingFace model folder, kept in the store.

A run then publishes that folder where people look for it: the weight files are hard links into the
store where the file system allows it, so that a model is not on disk twice.
"""

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from compress_core.hf.checkpoint import Checkpoint
from compress_core.hf.factored import FactoredLinear
from compress_core.hf.factorise import (
    check_indices,
    factorise_from_config,
    require_factors,
    shared_factors,
)
from compress_core.hf.folder import FactoredWeights, write_folder
from compress_core.hf.footprint import expected_bytes
from compress_core.hf.quantised_linear import QuantisedLinear
from compress_core.hf.sparse_linear import SparseLinear
from storage.artifact import Artifact
from storage.disk import is_disk_full
from storage.errors import StorageError, StoreFullError, StorePermissionError
from storage.keys import recipe_key
from tasks.engine.cost import Cost
from tasks.engine.dense_model import FOLDER
from tasks.engine.job import Job
from tasks.engine.session import Group, Work
from tasks.engine.units import Unit
from tasks.stages.realise import read_factors

# What the modelling file that is written has and uses; nothing else names it.
WRITTEN = (
    FactoredLinear,
    SparseLinear,
    QuantisedLinear,
    factorise_from_config,
    shared_factors,
    require_factors,
    check_indices,
)


def materialise_group(job: Job, realised: Mapping[str, Unit]) -> Group:
    """The one unit that writes the folder.

    Args:
        job: What is done to which model.
        realised: Layer name to its ``realise`` unit.
    """
    model, layout, kept = job.model, job.model.layout, job.kept
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
        cost=Cost(disk=int(model.nbytes - (1 - kept) * compressible * per_number)),
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
                self._factors(work),
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

    def _factors(self, work: Work) -> Iterator[FactoredWeights]:
        job, layers = self.job, self.job.model.layout.layers
        for done, layer in enumerate(layers):
            found = read_factors(work, job, self.realised, layer)
            if found is not None:
                owner = job.owner(layer)
                yield FactoredWeights(
                    name=layer.name,
                    u=found.u,
                    v=found.v if owner == layer.name else None,
                    columns=found.columns,
                    column_index=found.index,
                    shared_with=None if owner == layer.name else owner,
                    sparse=found.sparse,
                    bias=found.bias,
                    codes=found.codes,
                )
            work.progress(done + 1, len(layers))


@contextmanager
def publishing(artifact: Artifact, target: Path) -> Iterator[Path]:
    """Puts the model folder of a ``materialise`` artifact at ``target``, replacing what is there.

    Yields a copy of it to add files to; it takes its place at once when the block ends, so that
    nobody sees a part of it, not even where two processes publish the same folder.

    Raises:
        StoreFullError, StorePermissionError: ``target`` cannot be written.
    """
    staging = target.with_name(f".{target.name}.{uuid4().hex[:8]}")
    try:
        shutil.copytree(artifact.file(FOLDER), staging, copy_function=_link_weights)
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


def _link_weights(source: str, target: str) -> None:
    """Links a weight file, copies every other and whatever cannot be linked."""
    if source.endswith(".safetensors"):
        try:
            os.link(source, target)
            return
        except OSError:  # another file system, or one without hard links: the copy is as good
            pass
    shutil.copyfile(source, target)
