"""Budgets that are not a share of the parameters, turned into one."""

import math

from compress_core.errors import BudgetError
from flows.runs.pipeline import make_job
from flows.runs.workspace import Workspace
from flows.settings.config import RunConfig

MOST = 0.99  # the mildest share that a search tries


def resolve_budget(workspace: Workspace, config: RunConfig) -> RunConfig:
    """The same run with bytes turned into a kept share; other budgets stay as they are.

    For methods that store sparse entries a bit per dense number is set aside for their places:
    no layer's take more; in codes the share itself counts them. Codes are counted in numbers of 16
    bits, so that a model in float32, of which numbers in no codes take twice as much, comes out
    below what is asked for.

    Raises:
        BudgetError: What is not compressed takes these bytes alone, or leaves the layers too few.
    """
    if config.target_bytes is None:
        return config
    model = workspace.model
    widths = {
        layer.name: model.checkpoint.torch_dtype(model.weight_key(layer.name)).itemsize
        for layer in model.layout.layers
    }
    widest = max(widths.values())
    compressible = sum(layer.dense_cost for layer in model.layout.layers)
    of_layers = sum(layer.dense_cost * widths[layer.name] for layer in model.layout.layers)
    fixed = model.nbytes - of_layers
    room = config.target_bytes - fixed
    beside, places = "", 0
    method = workspace.method(config)
    if room < compressible * widest and method.stores_entries and method.coding is None:
        places = sum(-(-layer.dense_cost // 8) for layer in model.layout.layers)
        beside = f", places of sparse entries {places:,} at most"
    kept = min(1.0, (room - places) / (compressible * widest))
    kept = math.floor(kept * 1e6) / 1e6
    if kept <= 0:
        raise BudgetError(
            f"--target-bytes {config.target_bytes:,} cannot be met: embeddings, norms and head, "
            f"which are not compressed, take {fixed:,} bytes alone{beside}"
        )
    found = at_kept(config, kept)
    try:
        make_job(workspace, found)
    except BudgetError as error:
        raise BudgetError(
            f"--target-bytes {config.target_bytes:,} cannot be met: embeddings, norms and head "
            f"take {fixed:,} bytes{beside}, and {error}"
        ) from None
    workspace.notes.append(f"--target-bytes {config.target_bytes:,} is kept={kept:g} of the layers")
    return found


def at_kept(config: RunConfig, kept: float) -> RunConfig:
    """The same run at a share of the compressible parameters."""
    budget = {"kept": kept, "of": "compressible", "target_bytes": None, "target_perplexity": None}
    return config.model_copy(update=budget)
