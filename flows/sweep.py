"""Several methods and budgets on one model: activations and decompositions are shared by key."""

from pathlib import Path
from typing import Any

from prefect import flow

from flows.config import SweepConfig
from flows.console import current_reporter
from flows.prepare import build_pipeline, check_methods, open_workspace
from flows.run import current_workspace, run_flow
from tasks.plots import plot_sweep


@flow(
    name="eigenpress sweep",
    flow_run_name="{config.methods} kept {config.kept} · {config.model}",
    persist_result=False,
)
def sweep_flow(config: SweepConfig) -> list[dict[str, Any]]:
    """Runs every method at every budget.

    Args:
        config: What is asked for.

    Returns:
        A result per run, methods outermost.
    """
    workspace = current_workspace.get()
    if workspace is None:
        check_methods(config, config.methods, config.kept)
        workspace = open_workspace(config)
    runs = config.runs()
    for run in runs:  # a budget that cannot be met is refused before the first run starts
        build_pipeline(workspace, run)
    token = current_workspace.set(workspace)
    results = []
    try:
        for number, run in enumerate(runs, start=1):
            current_reporter.get().say(
                f"── {run.method} kept {run.kept:g}  (run {number} of {len(runs)})"
            )
            results.append(run_flow(run))
    finally:
        current_workspace.reset(token)
    return results


def save_plot(home: Path, results: list[dict[str, Any]]) -> Path | None:
    """The picture of perplexity against size, under the data directory; None without perplexity."""
    if "perplexity" not in results[0]["metrics"]["compressed"]:
        return None
    folder = home.expanduser().absolute() / "plots"
    folder.mkdir(exist_ok=True)
    file = folder / f"{results[0]['model']}-{results[0]['run_id'][:8]}.png"
    plot_sweep(results, file)
    return file
