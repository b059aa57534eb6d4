"""Stage ``realise``: a decomposition and a share become the factors that will be stored."""

from torch import Tensor

from compress_core.decompose import ReadRows
from compress_core.method import Method
from compress_core.types import LayerRef, Share, affordable
from storage.artifact import Artifact
from tasks.allocate import rank_of
from tasks.components import code_of
from tasks.convert import get_tensor, put_tensor
from tasks.model import DenseModel
from tasks.units import Cost, Group, Unit, Work


def realise_groups(
    model: DenseModel, method: Method, decomposed: dict[str, Unit], allocation: Unit, kept: float
) -> list[Group]:
    """One group per block, one unit per layer; a layer that stays dense stores nothing."""

    def compute(work: Work) -> None:
        for unit in work.missing:
            rank = rank_of(unit.name)(work.artifact(allocation))
            with work.draft(unit) as draft:
                draft.attrs["rank"] = rank
                if rank is None:
                    continue
                source = work.artifact(unit.inputs["decomposition"])
                factors = method.decompose.realise(_reader(source), Share(rank))
                dtype = model.checkpoint.torch_dtype(model.weight_key(unit.name))
                put_tensor(draft, "u", factors.u.to(dtype))
                put_tensor(draft, "v", factors.v.to(dtype))

    return [
        Group(
            "realise",
            f"block {block}",
            [
                _unit(model, method, layer, decomposed[layer.name], allocation, kept)
                for layer in layers
            ],
            compute,
        )
        for block in range(len(model.layout.blocks))
        if (layers := model.layout.of_block(block))
    ]


def _unit(
    model: DenseModel,
    method: Method,
    layer: LayerRef,
    decomposed: Unit,
    allocation: Unit,
    kept: float,
) -> Unit:
    numbers = affordable(kept, layer.dense_cost)
    return Unit(
        "realise",
        layer.name,
        settings={"dtype": model.checkpoint.dtype(model.weight_key(layer.name))},
        code=[code_of(method.decompose)],
        inputs={"decomposition": decomposed},
        views={"rank": (allocation, rank_of(layer.name))},
        cost=Cost(numbers, 8 * numbers, 4 * numbers),
    )


def _reader(source: Artifact) -> ReadRows:
    def read(name: str, rows: int) -> Tensor:
        return get_tensor(source, name, rows=rows)

    return read
