"""What a report shows of a run: its result, and what was found of it in the store and in MLflow.

What is not there any more is a sentence that says so; the page shows it in the picture's place.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from compress_core.forms.names import FULL
from compress_core.types import LayerRef

Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Allocation:
    """What every layer stores.

    Attributes:
        layers: Every compressible layer.
        stored: Layer to its "rank" (None when dense), "columns", "entries" and "numbers", and the
            "bits" of these in words.
    """

    layers: Sequence[LayerRef]
    stored: Mapping[str, Mapping[str, Any]]

    @property
    def widths(self) -> str:
        """How many layers store numbers of how many bits; nothing where none has codes."""
        bits = Counter(own["bits"] for own in self.stored.values())
        if set(bits) == {str(FULL)}:
            return ""
        counts = [
            f"{name} in {many} of {bits.total()} layers" for name, many in sorted(bits.items())
        ]
        return f" Bits of a number: {', '.join(counts)}."

    @property
    def kinds(self) -> str:
        """How many layers are of entries, or of columns alone, and have components.

        Nothing where none is of either.
        """
        stored, total = self.stored.values(), len(self.stored)
        of_entries = sum(own["entries"] > 0 for own in stored)
        of_columns = sum(own["columns"] > 0 and not own["rank"] for own in stored)
        if not of_entries and not of_columns:
            return ""
        counts = {"sparse entries": of_entries, "kept columns alone": of_columns}
        (first, *more) = [found for found in counts.items() if found[1]]
        low = sum(bool(own["rank"]) for own in stored)
        said = [f"{first[0].capitalize()} in {first[1]} of {total} layers"]
        said += [f"{name} in {count}" for name, count in [*more, ("components", low)]]
        return f" {', '.join(said)}."


@dataclass(frozen=True)
class Spectra:
    """Singular values of a decomposition, in the metric in which it was made.

    Attributes:
        identity: Equal for runs that share their decompositions.
        values: Layer (or stack) to its singular values (components,), largest first.
    """

    identity: str
    values: Mapping[str, Floats]


@dataclass(frozen=True)
class Prediction:
    """What cutting the decompositions to other budgets is predicted to cost.

    Attributes:
        shares: Kept share of the compressible parameters, ascending.
        error: At each, the part of all squared error that is left, in [0, 1]; None where layers
            may be of entries or columns, of which no decomposition says it.
        divergence: At each, KL to the dense model in nats per token; None where the allocator
            measures no sensitivities.
        how: Whose allocation it is.
    """

    shares: Sequence[float]
    error: Sequence[float] | None
    divergence: Sequence[float] | None
    how: str


@dataclass(frozen=True)
class Shown:
    """One run.

    Attributes:
        result: As ``eigenpress run --json`` prints it, or the part of it in a sweep's report.
        config: What was asked for, resolved; None where its record is gone.
        created: When it ended; "" where its record is gone.
        allocation: What every layer stores, or why that is not known.
        prediction: Other budgets, or why nothing is predicted.
        spectra: Of its decompositions, or why there are none.
        curves: Of its trainings: "learn", "recover" or "blocks" to name and a value per step.
    """

    result: Mapping[str, Any]
    config: Mapping[str, Any] | None
    created: str
    allocation: Allocation | str
    prediction: Prediction | str
    spectra: Spectra | str
    curves: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """As people see it, with allocator and options."""
        return str(self.result["method"])

    @property
    def label(self) -> str:
        """Method and budget."""
        return f"{self.method} kept {self.result['kept']:g}"

    @property
    def share(self) -> float:
        """What is stored of the compressible parameters."""
        parameters = self.result["parameters"]
        return float(parameters["compressible_compressed"] / parameters["compressible_dense"])


@dataclass(frozen=True)
class Sample:
    """What models write after one prompt.

    Attributes:
        prompt: The same for all.
        texts: Model ("dense", then a run's label) to what it wrote.
    """

    prompt: str
    texts: Mapping[str, str]
