"""Stage ``allocate``: one budget becomes each layer's share; reads kilobytes, never factors."""

from collections.abc import Mapping

from compress_core.allocate.base import Evidence
from compress_core.types import Share
from storage.artifact import Artifact
from tasks.engine.components import code_of, describe
from tasks.engine.job import Job
from tasks.engine.units import Group, Unit, View, Work
from tasks.stages.arrays import get_tensor


def allocate_group(
    job: Job,
    collected: Mapping[str, Unit],
    decomposed: Mapping[str, Unit],
    probed: Mapping[str, Unit],
) -> Group:
    """The one unit that divides the budget.

    Args:
        job: Gives allocator and budget.
        collected: Block path, among others, to its ``collect`` unit.
        decomposed: Stack name to its ``decompose`` unit.
        probed: Stack name to its ``probe`` unit; empty where the allocator reads no table.
    """
    allocator, layers = job.method.allocate, job.layers
    views: dict[str, tuple[Unit, View]] = {}
    inputs: dict[str, Unit] = {}
    if "losses" in allocator.reads:
        inputs |= {f"losses of {name}": unit for name, unit in decomposed.items()}
    if "divergence" in allocator.reads:
        views |= {f"divergence of {name}": (unit, _divergence) for name, unit in probed.items()}
    blocks = job.model.layout.blocks if "similarity" in allocator.reads else ()
    views |= {f"similarity of {path}": (collected[path], _cosine) for path in blocks}

    def compute(work: Work) -> None:
        evidence = Evidence(
            losses={
                name: get_tensor(work.artifact(unit), "loss")
                for name, unit in (decomposed.items() if "losses" in allocator.reads else ())
            },
            similarity={b: _cosine(work.artifact(collected[p])) for b, p in enumerate(blocks)},
            divergence={name: _divergence(work.artifact(unit)) for name, unit in probed.items()},
            tokens=job.samples * job.length,
        )
        shares = allocator.allocate(layers, job.kept, evidence)
        with work.draft(work.missing[0]) as draft:
            draft.attrs["ranks"] = {name: share.rank for name, share in shares.items()}
            entries = {name: share.nonzeros for name, share in shares.items() if share.nonzeros}
            if entries:
                draft.attrs["nonzeros"] = entries

    unit = Unit(
        "allocate",
        "model",
        settings={
            **describe(allocator),
            "kept": job.kept,
            "layers": {
                layer.name: [layer.block, layer.out_features, layer.in_features] for layer in layers
            },
            **({"tokens": job.samples * job.length} if "losses" in allocator.reads else {}),
        },
        code=[code_of(allocator), "compress_core.types.LayerRef"],
        inputs=inputs,
        views=views,
    )
    return Group("allocate", "model", [unit], compute)


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
    return Share(attrs["ranks"][stack], attrs.get("nonzeros", {}).get(stack, 0))


def view_of(stack: str) -> View:
    """The part of an allocation that concerns one layer or stack, as it enters keys."""

    def view(artifact: Artifact) -> int | list[int | None] | None:
        share = share_of(artifact, stack)
        return [share.rank, share.nonzeros] if share.nonzeros else share.rank

    return view
