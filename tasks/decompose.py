"""Stage ``decompose``: every layer once, independent of the budget, best components first."""

from compress_core.errors import CompressError
from compress_core.method import Method
from compress_core.types import LayerRef
from compress_core.whiten import Metric, Plain
from tasks.components import code_of, describe
from tasks.convert import get_metric, get_stats, put_tensor
from tasks.model import DenseModel
from tasks.units import Cost, Group, Unit, Work

METRICS = ("Metric", "Plain", "Diagonal", "SecondMoment")


def decompose_groups(
    model: DenseModel, method: Method, collected: dict[str, Unit], whitened: dict[str, Unit]
) -> list[Group]:
    """One group per block, one unit per layer.

    Args:
        model: The dense model.
        method: Gives decomposer and whitener.
        collected: Tap name to its ``collect`` unit.
        whitened: Tap name to its ``whiten`` unit; empty when the metric needs no statistics.
    """
    return [
        Group(
            "decompose",
            f"block {block}",
            [_unit(model, method, layer, collected, whitened) for layer in layers],
            _Decompose(model, method, {layer.name: layer for layer in layers}),
        )
        for block in range(len(model.layout.blocks))
        if (layers := model.layout.of_block(block))
    ]


def _unit(
    model: DenseModel,
    method: Method,
    layer: LayerRef,
    collected: dict[str, Unit],
    whitened: dict[str, Unit],
) -> Unit:
    inputs = {}
    if layer.tap in whitened:
        inputs["metric"] = whitened[layer.tap]
        if method.whiten.keeps_gram:
            inputs["statistics"] = collected[layer.tap]
    small, large = sorted((layer.out_features, layer.in_features))
    return Unit(
        "decompose",
        layer.name,
        settings={
            **describe(method.decompose),
            **({"whitener": describe(method.whiten)} if "statistics" in inputs else {}),
            "rank": layer.paying_rank,
            "transposed": layer.transposed,
        },
        code=[
            code_of(method.decompose),
            *([code_of(method.whiten)] if "statistics" in inputs else []),
            *(f"compress_core.whiten.{name}" for name in METRICS),
        ],
        sources={"weight": model.stored[model.weight_key(layer.name)]},
        inputs=inputs,
        cost=Cost(
            operations=9.0 * small**3 + 4.0 * small * large**2 + 4.0 * small**2 * large,
            memory=8 * (3 * layer.dense_cost + layer.in_features**2),
            disk=4 * layer.paying_rank * layer.atom_cost,
        ),
    )


class _Decompose:
    def __init__(self, model: DenseModel, method: Method, layers: dict[str, LayerRef]) -> None:
        self.model = model
        self.method = method
        self.layers = layers

    def __call__(self, work: Work) -> None:
        metrics: dict[str, Metric] = {}  # layers of one tap share it
        for done, unit in enumerate(work.missing):
            layer = self.layers[unit.name]
            if layer.tap not in metrics:
                metrics = {layer.tap: self._metric(work, unit)}
            weight = self.model.checkpoint.read(self.model.weight_key(layer.name))
            if layer.transposed:
                weight = weight.T
            try:
                prepared = self.method.decompose.prepare(
                    weight.to(self.model.device), metrics[layer.tap], layer.paying_rank
                )
            except CompressError as error:
                raise type(error)(f"layer {layer.name}: {error}") from error
            with work.draft(unit) as draft:
                for name, tensor in prepared.arrays.items():
                    put_tensor(draft, name, tensor)
                put_tensor(draft, "loss", prepared.loss)
            work.progress(done + 1, len(work.missing))

    def _metric(self, work: Work, unit: Unit) -> Metric:
        if "metric" not in unit.inputs:
            return Plain()
        if "statistics" in unit.inputs:  # the metric is the Gram itself, which is stored once
            stats = get_stats(work.artifact(unit.inputs["statistics"]))
            metric = self.method.whiten.metric(stats)
        else:
            metric = get_metric(work.artifact(unit.inputs["metric"]))
        return metric.to(self.model.device)
