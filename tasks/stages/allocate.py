"""Stage ``allocate``: one budget becomes each layer's share; reads kilobytes, never factors."""

from collections.abc import Mapping

from torch import Tensor

from compress_core.allocate.base import Evidence
from compress_core.allocate.stepped import Stepped
from compress_core.forms.names import FULL, GROUP, PLAIN
from compress_core.types import Share
from storage.artifact import Artifact
from tasks.engine.components import describe
from tasks.engine.job import Job
from tasks.engine.units import Unit, View
from tasks.engine.work import Group, Work
from tasks.stages.arrays import get_tensor
from tasks.stages.predict import CODES, COLUMNS, ENTRIES, PREDICTED


def allocate_group(
    job: Job,
    collected: Mapping[str, Unit],
    decomposed: Mapping[str, Unit],
    probed: Mapping[str, Unit],
    predicted: Mapping[str, Unit],
) -> Group:
    """The one unit that divides the budget.

    Args:
        job: Gives allocator and budget.
        collected: Block path, among others, to its ``collect`` unit.
        decomposed: Stack name to its ``decompose`` unit.
        probed: Stack name to its ``probe`` unit; empty where the allocator reads no table.
        predicted: Stack name to its ``predict`` unit; empty where the allocator reads no curve.
    """
    allocator, layers = job.method.allocate, job.layers
    views: dict[str, tuple[Unit, View]] = {}
    inputs: dict[str, Unit] = {}
    if "losses" in allocator.reads:
        inputs |= {f"losses of {name}": unit for name, unit in decomposed.items()}
    if "divergence" in allocator.reads:
        views |= {f"divergence of {name}": (unit, _divergence) for name, unit in probed.items()}
    inputs |= {f"prediction of {name}": unit for name, unit in predicted.items()}
    views |= {f"similarity of {path}": (collected[path], _cosine) for path in _read_blocks(job)}
    unit = Unit(
        "allocate",
        "model",
        settings={
            **describe(allocator),
            "kept": job.kept,
            "layers": {
                layer.name: [
                    *(layer.block, layer.out_features, layer.in_features),
                    *([] if layer.form == PLAIN else [layer.form]),
                    *([] if layer.bits == FULL else [layer.bits]),
                    *([] if layer.group == GROUP else [f"groups of {layer.group}"]),
                ]
                for layer in layers
            },
            **({"tokens": job.samples * job.length} if "losses" in allocator.reads else {}),
        },
        code=[allocator.inner, allocator] if isinstance(allocator, Stepped) else [allocator],
        inputs=inputs,
        views=views,
    )
    compute = _Allocate(job, collected, decomposed, probed, predicted)
    return Group("allocate", "model", [unit], compute)


class _Allocate:
    def __init__(
        self,
        job: Job,
        collected: Mapping[str, Unit],
        decomposed: Mapping[str, Unit],
        probed: Mapping[str, Unit],
        predicted: Mapping[str, Unit],
    ) -> None:
        self.job = job
        self.collected = collected
        self.decomposed = decomposed
        self.probed = probed
        self.predicted = predicted

    def __call__(self, work: Work) -> None:
        job, reads = self.job, self.job.method.allocate.reads
        evidence = Evidence(
            losses={
                name: get_tensor(work.artifact(unit), "loss")
                for name, unit in (self.decomposed.items() if "losses" in reads else ())
            },
            similarity={
                block: _cosine(work.artifact(self.collected[path]))
                for block, path in enumerate(_read_blocks(job))
            },
            divergence={
                name: _divergence(work.artifact(unit)) for name, unit in self.probed.items()
            },
            tokens=job.samples * job.length,
            predicted=self._curves(work, PREDICTED) if "predicted" in reads else {},
            codes=self._curves(work, CODES) if "codes" in reads else {},
            entries=self._curves(work, ENTRIES) if "entries" in reads else {},
            columns=self._curves(work, COLUMNS) if "columns" in reads else {},
        )
        shares = job.method.allocate.allocate(job.layers, job.kept, evidence)
        with work.draft(work.missing[0]) as draft:
            draft.attrs["ranks"] = {name: share.rank for name, share in shares.items()}
            entries = {name: share.nonzeros for name, share in shares.items() if share.nonzeros}
            if entries:
                draft.attrs["nonzeros"] = entries
            columns = {name: share.columns for name, share in shares.items() if share.columns}
            if columns:
                draft.attrs["columns"] = columns
            bits = {x.name: shares[x.name].bits or x.bits for x in job.layers}
            if set(bits.values()) != {FULL}:
                draft.attrs["bits"] = bits
            corrections = {n: x.correction for n, x in shares.items() if x.correction is not None}
            if corrections:
                draft.attrs["correction"] = corrections

    def _curves(self, work: Work, name: str) -> dict[str, Tensor]:
        return {layer: get_tensor(work.artifact(up), name) for layer, up in self.predicted.items()}


def _read_blocks(job: Job) -> tuple[str, ...]:
    """Blocks whose cosine the allocator reads."""
    return job.model.layout.blocks if "similarity" in job.method.allocate.reads else ()


def _cosine(artifact: Artifact) -> float:
    return float(artifact.attrs["cosine"])


def _divergence(artifact: Artifact) -> list[float]:
    return list(artifact.attrs["divergence"])


def read_shares(artifact: Artifact) -> dict[str, Share]:
    """Layer or stack name to its share."""
    return {name: share_of(artifact, name) for name in artifact.attrs["ranks"]}


def share_of(artifact: Artifact, stack: str) -> Share:
    """The share of one layer or stack."""
    attrs = artifact.attrs
    bits = attrs.get("bits", {}).get(stack, FULL)
    nonzeros, columns = (attrs.get(name, {}).get(stack, 0) for name in ("nonzeros", "columns"))
    correction = attrs.get("correction", {}).get(stack)
    return Share(attrs["ranks"][stack], nonzeros, bits, correction, columns)


def view_of(stack: str) -> View:
    """The part of an allocation that concerns one layer or stack, as it enters keys."""

    def view(artifact: Artifact) -> int | list[int | None] | None:
        share = share_of(artifact, stack)
        if share.columns:
            return [share.rank, share.nonzeros, share.bits, share.correction, share.columns]
        if share.correction is not None:
            return [share.rank, share.nonzeros, share.bits, share.correction]
        if share.bits != FULL:
            return [share.rank, share.nonzeros, share.bits]
        return [share.rank, share.nonzeros] if share.nonzeros else share.rank

    return view
