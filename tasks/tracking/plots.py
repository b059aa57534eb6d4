"""Pictures of a run: where the budget went, and what quality each size has."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, StrMethodFormatter

from compress_core.types import LayerRef


def plot_allocation(
    layers: Sequence[LayerRef], stored: Mapping[str, Mapping[str, Any]], file: Path
) -> None:
    """A bar per layer: the share of its parameters that stays.

    Args:
        layers: Every compressible layer.
        stored: Layer name to what it stores, with its ``numbers``.
        file: PNG to write.
    """
    figure = Figure(figsize=(max(6.0, 0.16 * len(layers)), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    kinds = list(dict.fromkeys(layer.name.rpartition(".")[2] for layer in layers))
    for index, kind in enumerate(kinds):
        places = [i for i, layer in enumerate(layers) if layer.name.endswith("." + kind)]
        heights = [stored[layers[i].name]["numbers"] / layers[i].dense_cost for i in places]
        axes.bar(places, heights, color=f"C{index % 10}", label=kind)
    axes.set_ylim(0, 1)
    axes.set_ylabel("kept share of the layer")
    firsts = [i for i, layer in enumerate(layers) if i == 0 or layers[i - 1].block != layer.block]
    axes.set_xticks(firsts, [str(layers[i].block) for i in firsts])
    axes.set_xlabel("block")
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(file, dpi=120)


def _sparse_label(value: float, _: int | None) -> str:
    """Labels 2 and 5 of each decade, so that a narrow range has numbers and a wide one no crowd."""
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""


def plot_sweep(results: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Perplexity against stored parameters, a line per method, dense as a level.

    Args:
        results: Results of runs on one model and text.
        file: PNG to write.
    """
    methods = list(dict.fromkeys(result["method"] for result in results))
    many = len(methods) > 6  # then the legend has no room inside the axes
    size = (9.5, max(4.5, 0.24 * len(methods))) if many else (6.5, 4.5)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, method in enumerate(methods):
        cells = sorted(
            (r["parameters"]["compressed"] / 1e6, r["metrics"]["compressed"]["perplexity"])
            for r in results
            if r["method"] == method and "perplexity" in r["metrics"]["compressed"]
        )
        axes.plot(
            [c[0] for c in cells],
            [c[1] for c in cells],
            marker="osDv^"[number // 10 % 5],
            linestyle=("-", "--", "-.")[number // 10 % 3],
            color=f"C{number % 10}",
            label=method,
        )
    dense = results[0]
    if "perplexity" in dense["metrics"]["dense"]:
        level = dense["metrics"]["dense"]["perplexity"]
        axes.axhline(level, color="black", linestyle=":", label="dense")
    low, high = axes.get_ylim()
    if high > 4 * low:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(_sparse_label))
    axes.set_xlabel("stored parameters, millions")
    axes.set_ylabel("perplexity")
    axes.grid(alpha=0.3, which="both")
    if many:
        figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    else:
        axes.legend(frameon=False)
    axes.set_title(f"{dense['model']} on {next(iter(dense['metrics']['dense']['texts']))}")
    figure.savefig(file, dpi=120)


def plot_training(results: Sequence[Mapping[str, Any]], file: Path) -> None:
    """The stored share against steps, its target dotted, and below it the divergence.

    Args:
        results: Results of runs with "curves", of which "kept" is one.
        file: PNG to write.
    """
    figure = Figure(figsize=(7.5, 6.0), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    for number, result in enumerate(results):
        color, curves = f"C{number % 10}", result["curves"]
        above.plot(curves["kept"], color=color, label=f"{result['method']} {result['kept']:g}")
        above.axhline(result["kept"], color=color, linestyle=":", linewidth=0.8)
        if "kl" in curves:
            below.plot(curves["kl"], color=color, linewidth=0.8)
    above.set_ylabel("stored share")
    below.set_ylabel("KL, nats per token")
    below.set_xlabel("step")
    below.set_yscale("symlog", linthresh=1e-2)
    below.set_ylim(bottom=0)
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize="small")
    figure.savefig(file, dpi=120)
