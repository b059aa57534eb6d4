"""What an allocation is predicted to cost, against a layer that is cut and measured by hand."""

import pytest
import torch

from compress_core.allocate.hull import Hull, sensitivity
from compress_core.allocate.predict import predicted_divergence, predicted_error, summed
from compress_core.decompose import ProjectOutputs
from compress_core.metric import Plain
from compress_core.types import LayerRef, Share

LAYERS = [LayerRef("a", 0, 12, 10, "a"), LayerRef("b", 1, 10, 14, "b")]


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        layer.name: torch.randn(
            layer.out_features, layer.in_features, generator=generator, dtype=torch.float64
        )
        for layer in LAYERS
    }


def test_the_predicted_error_is_that_of_the_cut_weights() -> None:
    dense, losses, left = weights(), {}, 0.0
    shares = {"a": Share(3), "b": Share(None)}
    for name, weight in dense.items():
        prepared = ProjectOutputs().prepare(weight, Plain(), 5)
        losses[name] = prepared.loss
        if shares[name].rank is not None:
            cut = ProjectOutputs().realise(lambda n, k: prepared.arrays[n][:k], shares[name])  # noqa: B023
            left += float((weight - cut.dense().double()).square().sum())
    whole = sum(float(weight.square().sum()) for weight in dense.values())
    assert predicted_error(LAYERS, losses, shares) == pytest.approx(left / whole, rel=1e-6)
    assert predicted_error(LAYERS, losses, dict.fromkeys(dense, Share(None))) == 0.0
    assert predicted_error(LAYERS, losses, dict.fromkeys(dense, Share(0))) == pytest.approx(1.0)


def test_the_predicted_divergence_of_the_probed_cut_is_what_was_probed() -> None:
    losses = {"a": torch.tensor([8.0, 4.0, 2.0, 1.0]), "b": torch.tensor([9.0, 3.0, 1.0, 0.5])}
    probed = Hull().probe_share
    table = {"a": [0.5], "b": [0.25]}
    for layer in LAYERS:
        shares = {other.name: Share(1 if other is layer else None) for other in LAYERS}
        found = predicted_divergence(LAYERS, losses, table, probed, shares)
        assert found == pytest.approx(table[layer.name][0])
        assert sensitivity(layer, losses[layer.name], table[layer.name][0], probed) > 0


def test_what_curves_leave_is_added_up_and_a_dense_layer_leaves_nothing() -> None:
    curves = {"a": torch.tensor([8.0, 4.0, 2.0, 1.0]), "b": torch.tensor([9.0, 3.0, 1.0, 0.5])}
    assert summed(LAYERS, curves, {"a": Share(2), "b": Share(1)}) == 5.0
    assert summed(LAYERS, curves, {"a": Share(None), "b": Share(0)}) == 9.0
