"""Basis Sharing (arXiv 2410.03765): layers of adjacent blocks have one in-factor in common.

From the paper: groups of 2 blocks; the weights of a group are put side by side and decomposed in
the metric of their summed H; q, k, v, gate and up share, what writes to the residual stream does
not; the rank is (in · out · g · kept) / (in + out · g), one basis per group. At 40 % removal and
more the paper fits later layers' coefficients again on compressed inputs: that is ``update=u``.

In our convention weights are stacked by rows: the shared basis is the in-factor, stored once.
"""

from compress_core.errors import ConfigError
from compress_core.fit import Prefix
from compress_core.method import Method, Sharing
from compress_core.metric import OutputError
from compress_core.options import one_of
from compress_core.refine.least_squares import Alternate

# Layers that write to the residual stream, as the architectures name them.
WRITERS = ("o_proj", "down_proj", "c_proj", "out_proj", "dense", "dense_4h_to_h", "fc2", "fc_out")


def basis_sharing(group: int = 2, update: str = "none", prefix: str = "layer") -> Method:
    """One basis per group of adjacent blocks.

    Args:
        group: Blocks in a group; it divides the model's blocks.
        update: "none", or "u" to fit the layers' own coefficients on the compressed prefix.
        prefix: Whether inputs are measured again after each "layer" or each "block".

    Raises:
        ConfigError: A value is none of these.
    """
    if group < 1:
        raise ConfigError(f"group must be at least 1, got {group}")
    one_of("method 'basis_sharing'", "update", update, ("none", "u"))
    return Method(
        "basis_sharing",
        "one basis for the layers of adjacent blocks",
        "2410.03765",
        weighting=OutputError(),
        fit=Alternate(0) if update == "u" else None,
        prefix=Prefix(prefix),  # type: ignore[arg-type]  # it checks
        sharing=Sharing(group, WRITERS),
    )
