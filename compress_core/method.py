"""A compression method is data: one choice per stage."""

from dataclasses import dataclass

from compress_core.allocate.uniform import Allocator, Uniform
from compress_core.decompose import Decomposer, ProjectOutputs
from compress_core.whiten import Unweighted, Whitener


@dataclass(frozen=True)
class Method:
    """What each stage does.

    Attributes:
        name: What users type.
        summary: One line for the table of methods.
        paper: arXiv id, or "" for folklore.
        whiten: Metric of the error.
        decompose: Budget-free decomposition.
        allocate: How the budget is divided.
    """

    name: str
    summary: str
    paper: str
    whiten: Whitener = Unweighted()
    decompose: Decomposer = ProjectOutputs()
    allocate: Allocator = Uniform()
