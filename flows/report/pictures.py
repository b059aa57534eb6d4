"""The pictures of a report's page, each as SVG in the page's own colours."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from compress_core.allocate.by_type import type_of
from compress_core.types import LayerRef
from flows.report.series import sweep_series
from flows.report.shown import Allocation, Floats, Prediction, Shown, Spectra
from flows.report.svg import FONT, SERIES, WIDTH, drawing, inline
from tasks.tracking.limits import thin
from tasks.tracking.plots import COLOURS, SIZES, draw_allocation, draw_quality, log_scale

FAINT = "0.7"  # of what has no colour of its own left
POINTS = 60  # of one curve: more are not seen at this size
EXPLODED = 4  # times the median
ROOM = 1.05  # times the largest value, at the top of a picture
END = 9  # letters of a name's end: " kept 0.6"
LINE, SMALL = 0.19, {"frameon": False, "fontsize": FONT - 1}  # inches of a legend's line


def colours_of(results: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Method to its colour, the same in all pictures of a page.

    Where there are more methods than a picture has colours, the baselines and the best have them,
    and others are grey.
    """
    methods = list(dict.fromkeys(str(run["method"]) for run in results))
    chosen = methods
    if len(methods) > len(COLOURS):
        measured = [run for run in results if "perplexity" in run["metrics"]["compressed"]]
        chosen = sweep_series(measured) if measured else methods[: len(COLOURS)]
    coloured = [name for name in methods if name in chosen]
    return dict.fromkeys(methods, FAINT) | dict(zip(coloured, SERIES, strict=False))


def _coloured(colours: Mapping[str, str]) -> list[str]:
    return [method for method, colour in colours.items() if colour != FAINT]


def _figure(height: float, legend: int = 0) -> Figure:
    return Figure(figsize=(WIDTH, height + LINE * legend), layout="constrained")


def quality(results: Sequence[Mapping[str, Any]], size: str, colours: Mapping[str, str]) -> Markup:
    """Perplexity against one kind of size, every method, with the dense point.

    Args:
        results: With a perplexity.
        size: "bytes" or "parameters".
        colours: As of :func:`colours_of`.
    """
    lines = [method for method in _coloured(colours) if any(r["method"] == method for r in results)]
    with drawing():
        figure = _figure(2.9, len(lines) + 1)
        axes = figure.subplots()
        for run in (run for run in results if run["method"] not in lines):
            found = run["metrics"]["compressed"]["perplexity"]
            axes.plot(run[size]["compressed"] / 1e6, found, ".", color=FAINT)
        draw_quality(axes, results, dict.fromkeys(lines), size, highest(results))
        dense = results[0]
        point = dense[size]["dense"] / 1e6, dense["metrics"]["dense"]["perplexity"]
        axes.plot(*point, marker="*", markersize=10, color="black", linestyle="")
        figure.legend(loc="outside lower left", **SMALL)
        return inline(figure, f"quality-{size}", f"perplexity against {SIZES[size]}")


def highest(results: Sequence[Mapping[str, Any]]) -> float:
    """The largest perplexity that is drawn: one that exploded would press all others together."""
    found = [run["metrics"]["compressed"]["perplexity"] for run in results]
    limit = EXPLODED * median(found)
    return ROOM * max(value for value in found if value <= limit)


def predicted(shown: Sequence[Shown], colours: Mapping[str, str]) -> Markup:
    """Error that cut decompositions leave at any share, a line per method."""

    def has_error(run: Shown) -> bool:
        return isinstance(run.prediction, Prediction) and run.prediction.error is not None

    with drawing():
        known = _one_per_method(shown, has_error)
        figure = _figure(2.7, len(_coloured(colours)))
        axes = figure.subplots()
        for run in known:
            assert isinstance(run.prediction, Prediction) and run.prediction.error is not None
            shares, error = run.prediction.shares, run.prediction.error
            axes.plot(shares, error, color=colours[run.method], label=_name(run.method, colours))
        axes.set_yscale("symlog", linthresh=1e-3)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(_plain)
        _share_axis(axes)
        axes.set_ylabel("predicted error, part of all")
        figure.legend(loc="outside lower left", **SMALL)
        return inline(figure, "predicted", "predicted error against the kept share")


def measured(shown: Sequence[Shown], colours: Mapping[str, str]) -> Markup:
    """KL to the dense model that was measured, and where sensitivities are known, predicted."""
    with drawing():
        methods = list(dict.fromkeys(run.method for run in shown))
        figure = _figure(2.7, len(_coloured(colours)))
        axes = figure.subplots()
        values = []
        for method in methods:
            points = sorted(
                (run.share, run.result["metrics"]["compressed"]["kl"])
                for run in shown
                if run.method == method
            )
            values += [value for _, value in points]
            label = _name(method, colours)
            axes.plot(*zip(*points, strict=True), "o-", color=colours[method], label=label)
        foretold = _one_per_method(
            shown,
            lambda run: isinstance(run.prediction, Prediction) and bool(run.prediction.divergence),
        )
        for run in foretold:
            assert isinstance(run.prediction, Prediction) and run.prediction.divergence
            shares, divergence = run.prediction.shares, run.prediction.divergence
            axes.plot(shares, divergence, linestyle=":", color=colours[run.method])
        low, high = max(min(values), 1e-6), max(values)
        log_scale(axes, low, high)
        if high > 4 * low:
            axes.set_ylim(low / 2, high * 1.5)
        _share_axis(axes)
        axes.set_ylabel("measured KL, nats per token")
        figure.legend(loc="outside lower left", **SMALL)
        return inline(figure, "measured", "measured KL against the kept share")


def _plain(value: float, _: float | None = None) -> str:
    return f"{value:g}" if value == 0 or value >= 0.001 else f"{value:.0e}".replace("e-0", "e-")


def _share_axis(axes: Axes) -> None:
    axes.set_xlabel("kept share of the compressible parameters")
    axes.set_xlim(0.15, 1.0)
    axes.grid(alpha=0.6)


def _name(method: str, colours: Mapping[str, str]) -> str | None:
    """Of a line in the legend; those without a colour of their own have none."""
    return None if colours[method] == FAINT else _short(method)


def _one_per_method(shown: Sequence[Shown], known: Callable[[Shown], bool]) -> list[Shown]:
    return list({run.method: run for run in shown if known(run)}.values())


def _short(name: str, most: int = 58) -> str:
    """A name cut in its middle where it is long: at its end stands the budget."""
    return name if len(name) <= most else f"{name[: most - END]}…{name[-END:]}"


def heat_map(allocation: Allocation, number: int, label: str) -> Markup:
    """Share kept by layer and module.

    Args:
        allocation: Of one run.
        number: Unlike that of any other heat map of the page.
        label: What the run is called.
    """
    kinds = len({type_of(layer) for layer in allocation.layers})
    with drawing():
        figure = Figure(figsize=(1.5 * WIDTH, 0.9 + 0.26 * kinds), layout="constrained")
        draw_allocation(figure, allocation.layers, allocation.stored)
        return inline(figure, f"heat-map-{number}", f"kept share by block and module of {label}")


def spectra(runs: Sequence[Shown], number: int) -> Markup:
    """Singular values of the first, a middle and the last block, a panel per kind of layer.

    Args:
        runs: Of one method; their cuts are marked on the curves of the first one.
        number: Unlike that of any other such picture of the page.
    """
    first = runs[0]
    assert isinstance(first.spectra, Spectra)
    kinds = _kinds(first)
    rows = -(-len(kinds) // 2)
    with drawing():
        height = 0.9 + 1.35 * rows
        figure = Figure(figsize=(WIDTH, height))
        panels = figure.subplots(rows, 2, squeeze=False).flatten()
        figure.subplots_adjust(0.15, 0.55 / height, 0.98, 1 - 0.5 / height, 0.28, 0.45)
        for panel, (kind, layers) in zip(panels, kinds.items(), strict=False):
            for colour, layer in zip(SERIES, _spread(layers), strict=False):
                name = f"block {layer.block}"
                _spectrum(panel, first.spectra.values[layer.name], colour, name)
                for run in runs:
                    _cut(panel, run, layer, first.spectra.values[layer.name], colour)
            panel.set_title(kind, fontsize=FONT - 1)
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter(_plain)
            panel.yaxis.set_minor_formatter(NullFormatter())
            panel.grid(alpha=0.6)
        for panel in panels[len(kinds) :]:
            panel.set_axis_off()
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="upper left", ncols=3, **SMALL)
        figure.supxlabel("component", fontsize=FONT)
        figure.supylabel("singular value, part of the largest", fontsize=FONT)
        return inline(figure, f"spectra-{number}", f"singular values of {first.method}")


def _kinds(run: Shown) -> dict[str, list[LayerRef]]:
    """Kind of layer to the layers of that kind that were decomposed each by itself."""
    assert isinstance(run.spectra, Spectra) and isinstance(run.allocation, Allocation)
    kinds: dict[str, list[LayerRef]] = {}
    for layer in run.allocation.layers:
        if layer.name in run.spectra.values:
            kinds.setdefault(type_of(layer).rpartition(".*.")[2], []).append(layer)
    return kinds


def has_kinds(run: Shown) -> bool:
    """Whether there are spectra to draw, of layers by themselves."""
    there = isinstance(run.spectra, Spectra) and isinstance(run.allocation, Allocation)
    return there and bool(_kinds(run))


def _spread(layers: Sequence[LayerRef]) -> list[LayerRef]:
    """The first, the middle and the last of them."""
    last = len(layers) - 1
    return [layers[place] for place in sorted({0, (last + 1) // 2, last})]


def _spectrum(panel: Axes, values: Floats, colour: str, label: str) -> None:
    largest = float(values[0]) if len(values) and values[0] > 0 else 1.0
    points = [(k + 1, v / largest) for k, v in thin(values.tolist(), POINTS) if v > 0]
    if points:
        panel.plot(*zip(*points, strict=True), color=colour, linewidth=1.1, label=label)


def _cut(panel: Axes, run: Shown, layer: LayerRef, values: Floats, colour: str) -> None:
    """A dot where a run cuts a layer; none where it stays dense."""
    assert isinstance(run.allocation, Allocation)
    rank = run.allocation.stored[layer.name]["rank"]
    if rank and rank <= len(values) and values[rank - 1] > 0:
        panel.plot(rank, values[rank - 1] / values[0], "o", color=colour, markersize=4)


CURVES = {  # of trainings: what is drawn of each stage, and what it is called
    "learn": {"kept": "stored share", "kl": "KL, nats per token"},
    "recover": {"kl": "KL of the batch", "held_back": "held-back loss"},
}


def training(shown: Sequence[Shown], stage: str) -> Markup:
    """What a stage's trainings went through, step by step: a panel per curve, a line per run.

    Args:
        shown: Runs with curves of that stage.
        stage: "learn" or "recover".
    """
    there = {
        name: title
        for name, title in CURVES[stage].items()
        if any(thin(run.curves[stage].get(name, ())) for run in shown)
    }
    with drawing():
        figure = _figure(0.4 + 1.6 * max(1, len(there)), min(len(shown), len(SERIES)))
        panels = figure.subplots(max(1, len(there)), 1, sharex=True, squeeze=False).flatten()
        for panel, (name, title) in zip(panels, there.items(), strict=False):
            for place, run in enumerate(shown):
                colour = SERIES[place] if place < len(SERIES) else FAINT
                points = thin(run.curves[stage].get(name, ()), 4 * POINTS)
                if points:
                    label = _short(run.label) if place < len(SERIES) else None
                    panel.plot(*zip(*points, strict=True), color=colour, linewidth=1, label=label)
            panel.set_ylabel(title)
            panel.grid(alpha=0.6)
        panels[-1].set_xlabel("step")
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower left", **SMALL)
        return inline(figure, f"training-{stage}", f"curves of the training in stage {stage}")


def times(rows: Mapping[str, Mapping[str, float]]) -> Markup:
    """Seconds by run, stages beside one another in a bar.

    Args:
        rows: Run to stage and its seconds.
    """
    stages = list(dict.fromkeys(stage for row in rows.values() for stage in row))
    total = {stage: math.fsum(row.get(stage, 0.0) for row in rows.values()) for stage in stages}
    largest = sorted(stages, key=lambda stage: -total[stage])[: len(SERIES)]
    with drawing():
        figure = _figure(0.7 + 0.22 * len(rows), -(-len(largest) // 3) + 1)
        axes = figure.subplots()
        places = range(len(rows))
        start = [0.0] * len(rows)
        for stage in [stage for stage in stages if stage in largest] + ["others"]:
            of_stage = [stage] if stage != "others" else [s for s in stages if s not in largest]
            width = [math.fsum(row.get(one, 0.0) for one in of_stage) for row in rows.values()]
            if not any(width):
                continue
            number = largest.index(stage) if stage in largest else None
            colour = FAINT if number is None else SERIES[number]
            axes.barh(places, width, left=start, color=colour, label=stage, height=0.7)
            start = [a + b for a, b in zip(start, width, strict=True)]
        axes.set_yticks(places, [_short(row, 30) for row in rows])
        axes.invert_yaxis()
        axes.set_xlabel("seconds")
        axes.grid(axis="x", alpha=0.6)
        figure.legend(loc="outside lower left", ncols=3, **SMALL)
        return inline(figure, "times", "seconds by run and stage")
