"""Pictures of a run: where the budget went, and what quality each size has."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from compress_core.types import LayerRef

COLOURS = [("-", marker, f"C{number}") for number, marker in enumerate("oD^P*hd")]
GREYS = (("--", "s", "0.7"), ("--", "v", "0.5"), ("--", "X", "0.25"))


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


def plot_sweep(
    results: Sequence[Mapping[str, Any]],
    series: Mapping[str, int | None],
    rest: int,
    file: Path,
) -> None:
    """Perplexity against stored parameters, a line per method, dense as a level.

    Args:
        results: Results of runs on one model and text.
        series: Methods whose lines are drawn, in the order of the legend; with a number (0 to 2),
            in that shade of grey, else in a colour.
        rest: How many rows the table has beside these; the legend says so.
        file: PNG to write.
    """
    figure = Figure(figsize=(8.5, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colours = iter(COLOURS)
    dense = results[0]["metrics"]["dense"]["perplexity"]
    drawn = [dense]
    for method, grey in series.items():
        line, marker, colour = next(colours) if grey is None else GREYS[grey]
        cells = sorted(
            (r["parameters"]["compressed"] / 1e6, r["metrics"]["compressed"]["perplexity"])
            for r in results
            if r["method"] == method
        )
        drawn += [cell[1] for cell in cells]
        axes.plot(
            [cell[0] for cell in cells],
            [cell[1] for cell in cells],
            linestyle=line,
            marker=marker,
            color=colour,
            label=_wrapped(method),
        )
    axes.axhline(dense, color="black", linestyle=":", label="dense")
    _scale(axes, min(drawn), max(drawn))
    axes.set_xlabel("stored parameters, millions")
    axes.set_ylabel("perplexity")
    axes.grid(alpha=0.3, which="both")
    more = f"{rest} more {'row' if rest == 1 else 'rows'} in the table" if rest else None
    small = {"fontsize": 9, "title_fontsize": 9, "frameon": False}
    figure.legend(loc="outside right upper", title=more, **small)
    text = next(iter(results[0]["metrics"]["dense"]["texts"]))
    axes.set_title(f"{results[0]['model']} on {text}")
    figure.savefig(file, dpi=120)


def _wrapped(method: str, width: int = 26) -> str:
    """A method's name on as many lines as it needs, broken before an option."""
    lines = [""]
    for part in re.split("(?=[:+])", method):
        if lines[-1] and len(lines[-1] + part) > width:
            lines.append("  ")
        lines[-1] += part
    return "\n".join(lines)


def _scale(axes: Axes, low: float, high: float) -> None:
    """Logarithmic where values are far apart, with plain numbers, as many as have room."""
    if high <= 4 * low:
        return
    axes.set_yscale("log")
    decades = math.log10(high / low)
    digits = "12357" if decades < 1 else "125" if decades < 2.5 else "1"

    def label(value: float, _: int | None) -> str:
        return f"{value:g}" if f"{value:e}"[0] in digits else ""

    axes.yaxis.set_major_formatter(FuncFormatter(label))
    axes.yaxis.set_minor_formatter(FuncFormatter(label))


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
