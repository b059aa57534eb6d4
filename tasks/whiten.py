"""Stage ``whiten``: what was measured at a tap becomes the metric of its layers' error."""

from compress_core.whiten import Whitener
from tasks.components import code_of, describe
from tasks.convert import get_stats, put_metric
from tasks.model import DenseModel
from tasks.units import Cost, Group, Unit, Work


def whiten_groups(model: DenseModel, whitener: Whitener, collected: dict[str, Unit]) -> list[Group]:
    """One group per block, one unit per tap; none when no tap is measured.

    Args:
        model: The dense model.
        whitener: The method's.
        collected: Tap name to its ``collect`` unit.
    """
    if not whitener.needs or "fisher" in whitener.needs:  # that is per layer, and a vector
        return []

    def compute(work: Work) -> None:
        for done, unit in enumerate(work.missing):
            stats = get_stats(work.artifact(unit.inputs["statistics"]))
            with work.draft(unit) as draft:
                put_metric(draft, whitener.metric(stats))
            work.progress(done + 1, len(work.missing))

    groups = []
    for block in range(len(model.layout.blocks)):
        units = []
        for tap, layers in model.layout.taps(block).items():
            features = layers[0].in_features
            units.append(
                Unit(
                    "whiten",
                    tap,
                    settings=describe(whitener),
                    code=[code_of(whitener)],
                    inputs={"statistics": collected[tap]},
                    cost=Cost(features**2, 8 * features**2, 8 * features),
                )
            )
        groups.append(Group("whiten", f"block {block}", units, compute))
    return groups
