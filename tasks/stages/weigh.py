"""Stage ``weigh``: what was measured at a tap becomes the metric of its layers' error."""

from compress_core.metric import Weighting, pack_metric
from compress_core.stats import InputStats
from tasks.engine.components import describe
from tasks.engine.cost import Cost
from tasks.engine.dense_model import DenseModel
from tasks.engine.units import Unit
from tasks.engine.work import Group, Work
from tasks.stages.arrays import Stored, put


def weigh_groups(
    model: DenseModel, weighting: Weighting, collected: dict[str, Unit]
) -> list[Group]:
    """One group per block, one unit per tap; none when no tap is measured.

    Args:
        model: The dense model.
        weighting: The method's.
        collected: Tap name to its ``collect`` unit.
    """
    if not weighting.needs or "fisher" in weighting.needs:  # that is per layer, and a vector
        return []
    compute = _Weigh(weighting)
    groups = []
    for block in range(len(model.layout.blocks)):
        units = []
        for tap, layers in model.layout.taps(block).items():
            features = layers[0].in_features
            units.append(
                Unit(
                    "weigh",
                    tap,
                    settings=describe(weighting),
                    code=[weighting],
                    inputs={"statistics": collected[tap]},
                    cost=Cost(memory=8 * features**2, disk=8 * features),
                )
            )
        groups.append(Group("weigh", f"block {block}", units, compute))
    return groups


class _Weigh:
    def __init__(self, weighting: Weighting) -> None:
        self.weighting = weighting

    def __call__(self, work: Work) -> None:
        for done, unit in enumerate(work.missing):
            stats = InputStats.unpack(Stored(work.artifact(unit.inputs["statistics"])))
            with work.draft(unit) as draft:
                put(draft, pack_metric(self.weighting.metric(stats)))
            work.progress(done + 1, len(work.missing))
