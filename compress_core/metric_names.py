"""Names of the metrics that users choose from; what the second is, is in `two_sided`."""

from typing import Literal, get_args

MetricName = Literal["inputs", "two_sided"]
METRIC_NAMES: tuple[str, ...] = get_args(MetricName)
"""Errors weighed by a layer's inputs as its method does, or by its outputs, too."""
INPUTS, TWO_SIDED = "inputs", "two_sided"
METRIC, METRIC_DAMP = "metric", "metric_damp"  # the options that choose
