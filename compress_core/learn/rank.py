"""No policy: items are ranked by what they are worth at first, and nothing is drawn."""

from dataclasses import dataclass

from compress_core.learn.base import Assignment, Learned
from compress_core.learn.masks import MaskPolicy, MaskTraining
from compress_core.learn.worth import Init


@dataclass(frozen=True)
class Ranking(MaskPolicy):
    """The first ranking, as it is.

    Attributes:
        init: What items are worth.
    """

    init: Init = "energy"
    updates = 0

    @property
    def batch(self) -> int:
        """One window: squares of single windows' gradients are averaged."""
        return 1

    def learn(self, given: Assignment) -> Learned:
        """See :class:`compress_core.learn.base.Learner`."""
        run = MaskTraining(given, self.init)
        return run.finish(run.run())
