"""Stage ``weigh``: what was measured at a tap becomes the metric of its layers' error."""

from compress_core.metric import Weighting
from tasks.engine.components import code_of, describe
from tasks.engine.cost import Cost
from tasks.engine.dense_model import DenseModel
from tasks.engine.units import Group, Unit, Work
from tasks.stages.arrays import get_stats, put_metric


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

    def compute(work: Work) -> None:
        for done, unit in enumerate(work.missing):
            stats = get_stats(work.artifact(unit.inputs["statistics"]))
            with work.draft(unit) as draft:
                put_metric(draft, weighting.metric(stats))
            work.progress(done + 1, len(work.missing))

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
                    code=[code_of(weighting)],
                    inputs={"statistics": collected[tap]},
                    cost=Cost(memory=8 * features**2, disk=8 * features),
                )
            )
        groups.append(Group("weigh", f"block {block}", units, compute))
    return groups
