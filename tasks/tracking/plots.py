"""Pictures of a run: where the budget went, and what quality each size has."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from compress_core.types import LayerRef

MOST_NUMBERED = 12  # blocks, in whose cells and below which a number has room
LEVELS = 20  # shades between 0 and 1
DARK, LIGHT = "#101010", "#fafafa"  # on bright and on dark cells, whatever is around the picture
COLOURS = [("-", marker, f"C{number}") for number, marker in enumerate("oD^P*hd")]
SIZES = {
    "parameters": "stored parameters, millions",
    "bytes": "MB on disk",
    "memory": "MB in memory",
}
GREYS = (("--", "s", "0.7"), ("--", "v", "0.5"), ("--", "X", "0.25"))


def plot_allocation(
    layers: Sequence[LayerRef], stored: Mapping[str, Mapping[str, Any]], file: Path
) -> None:
    """A map of the model as a picture; as :func:`draw_allocation`.

    Args:
        layers: Every compressible layer.
        stored: Layer name to what it stores, with its ``numbers``.
        file: PNG to write.
    """
    kinds = {_inside(layer) for layer in layers}
    figure = Figure(figsize=(8.5, 1.5 + 0.35 * len(kinds)), layout="constrained")
    FigureCanvasAgg(figure)
    draw_allocation(figure, layers, stored)
    figure.savefig(file, dpi=120)


def draw_allocation(
    figure: Figure, layers: Sequence[LayerRef], stored: Mapping[str, Mapping[str, Any]]
) -> None:
    """A map of the model, blocks across and kinds of layers down: what share of each stays.

    Args:
        figure: To draw on.
        layers: Every compressible layer.
        stored: Layer name to what it stores, with its ``numbers``.
    """
    inside = {layer.name: _inside(layer) for layer in layers}
    kinds = list(dict.fromkeys(inside.values()))
    blocks = max(layer.block for layer in layers) + 1
    shares = [[math.nan] * blocks for _ in kinds]
    for layer in layers:
        share = stored[layer.name]["numbers"] / layer.dense_cost
        shares[kinds.index(inside[layer.name])][layer.block] = share
    axes = figure.subplots()
    image = axes.pcolormesh(shares, cmap=colormaps["viridis"].resampled(LEVELS), vmin=0, vmax=1)
    axes.invert_yaxis()
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_yticks([place + 0.5 for place in range(len(kinds))], kinds)
    step = -(-blocks // MOST_NUMBERED)
    numbered = range(0, blocks, step)
    axes.set_xticks([block + 0.5 for block in numbered], map(str, numbered))
    axes.tick_params(length=0)
    axes.set_xlabel("block")
    cells = [(x, y, share) for y, row in enumerate(shares) for x, share in enumerate(row)]
    for x, y, share in cells if blocks <= MOST_NUMBERED else ():
        if not math.isnan(share):
            colour = DARK if share > 0.6 else LIGHT
            axes.text(x + 0.5, y + 0.5, f"{share:.2f}", ha="center", va="center", color=colour)
    figure.colorbar(image, label="kept share of the layer").outline.set_visible(False)


def _inside(layer: LayerRef) -> str:
    """The layer's name inside its block."""
    return layer.name.partition(f".{layer.block}.")[2] or layer.name


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
    draw_quality(axes, results, series)
    more = f"{rest} more {'row' if rest == 1 else 'rows'} in the table" if rest else None
    small = {"fontsize": 9, "title_fontsize": 9, "frameon": False}
    figure.legend(loc="outside right upper", title=more, **small)
    text = next(iter(results[0]["metrics"]["dense"]["texts"]))
    axes.set_title(f"{results[0]['model']} on {text}")
    figure.savefig(file, dpi=120)


def draw_quality(
    axes: Axes,
    results: Sequence[Mapping[str, Any]],
    series: Mapping[str, int | None],
    size: str = "parameters",
    top: float = math.inf,
) -> None:
    """Perplexity against a size, a line per method, dense as a level.

    Args:
        axes: To draw on.
        results: As of :func:`plot_sweep`.
        series: As of :func:`plot_sweep`.
        size: "parameters", or another word for a size in results: "bytes", "memory".
        top: The largest perplexity that is seen.
    """
    colours = iter(COLOURS)
    dense = results[0]["metrics"]["dense"]["perplexity"]
    drawn = [dense]
    for method, grey in series.items():
        line, marker, colour = next(colours) if grey is None else GREYS[grey]
        cells = sorted(
            (r[size]["compressed"] / 1e6, r["metrics"]["compressed"]["perplexity"])
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
    low = min(drawn)
    log_scale(axes, low, min(top, max(drawn)))
    if top < max(drawn):  # what is above it must not decide where the axis begins
        axes.set_ylim(low / (top / low) ** 0.06, top)
    axes.set_xlabel(SIZES[size])
    axes.set_ylabel("perplexity")
    axes.grid(alpha=0.3, which="both")


def _wrapped(method: str, width: int = 26) -> str:
    """A method's name on as many lines as it needs, broken before an option."""
    lines = [""]
    for part in re.split("(?=[:+])", method):
        if lines[-1] and len(lines[-1] + part) > width:
            lines.append("  ")
        lines[-1] += part
    return "\n".join(lines)


def log_scale(axes: Axes, low: float, high: float) -> None:
    """A logarithmic axis where values are far apart, with plain numbers, as many as have room."""
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
    draw_training(figure, results)
    figure.savefig(file, dpi=120)


def draw_training(figure: Figure, results: Sequence[Mapping[str, Any]]) -> None:
    """As :func:`plot_training`, on a figure that is there."""
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
