"""A report as one HTML page: no scripts, nothing fetched, light and dark, on a phone as well."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from compress_core.secrets import hide, hide_all
from flows.report import pictures
from flows.report.cells import blocks_table, results_table, scores_table, seconds_of, times_table
from flows.report.shown import Allocation, Prediction, Sample, Shown, Spectra
from flows.report.tables import number

HERE = Path(__file__).parent
MOST_FOLDED = 12  # heat maps, and methods with their spectra: the page stays some hundred KB
MOST_BARS = 24  # runs with a bar of their own

Part = dict[str, Any]


def render_page(
    title: str, shown: Sequence[Shown], samples: Sequence[Sample] | str, commands: Sequence[str]
) -> str:
    """The page.

    Args:
        title: What it is about.
        shown: Its runs, one or more, on one model and the same texts.
        samples: What the models write, or why that is not shown.
        commands: What makes the runs again, and the page.
    """
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined
    )
    environment.filters["breakable"] = _breakable
    sections = [
        _section("results", "Results", [_table(results_table(shown))]),
        _section("quality", "Quality against size", _quality(shown)),
        _section("prediction", "Predicted and measured", _prediction(shown)),
        _section("allocation", "Where the budget went", _allocation(shown)),
        _section("spectra", "Spectra and their cuts", _spectra(shown)),
        _section("training", "Training", _training(shown)),
        _section("scores", "Scores", _scores(shown)),
        _section("samples", "What the models write", _samples(samples)),
        _section("time", "Time and cache", _time(shown)),
        _section("again", "The same again", _again(shown, commands)),
    ]
    return environment.get_template("page.html").render(
        title=hide(title),
        subtitle=_subtitle(shown),
        facts=_facts(shown),
        sections=sections,
        css=Markup((HERE / "page.css").read_text(encoding="utf-8").strip()),
    )


def _breakable(name: str) -> Markup:
    """A method's name that may go on in the next line before an option."""
    return Markup("<wbr>").join(re.split("(?=[:@+])", name))


def _section(name: str, title: str, parts: Sequence[Part]) -> dict[str, Any]:
    return {"name": name, "title": title, "parts": parts}


def _text(text: str) -> Part:
    return {"kind": "text", "text": hide(text)}


def _table(table: Any) -> Part:
    return {"kind": "table", "table": table}


def _pictures(*made: tuple[Markup, str]) -> Part:
    return {"kind": "pictures", "pictures": [{"svg": svg, "caption": text} for svg, text in made]}


def _folded(title: str, svg: Markup, caption: str, *, opened: bool, wide: bool) -> Part:
    picture = {"svg": svg, "caption": caption}
    return {"kind": "folded", "title": title, "picture": picture, "open": opened, "wide": wide}


def _subtitle(shown: Sequence[Shown]) -> str:
    first = shown[0].result
    created = max(run.created for run in shown)
    when = f"{created[:10]} {created[11:16]} UTC, " if created else ""
    computed = f"run in {first['compute']}, " if "compute" in first else ""
    return f"{when}{computed}seed {first['seed']}, Eigenpress {first['code_version']}"


def _facts(shown: Sequence[Shown]) -> list[dict[str, str]]:
    """What one wants to know first: of one run, or of the model and the runs of a sweep."""
    first = shown[0].result
    dense = first["metrics"]["dense"]
    size = f"{first['parameters']['dense'] / 1e6:,.1f} M"
    facts = [
        _fact("model", str(first["model"]), f"{size}, {first['bytes']['dense'] / 1e6:,.1f} MB")
    ]
    if len(shown) > 1:
        methods = dict.fromkeys(run.method for run in shown)
        budgets = sorted({run.result["kept"] for run in shown}, reverse=True)
        kept = ", ".join(f"{kept:g}" for kept in budgets)
        facts.append(_fact("runs", str(len(shown)), f"{len(methods)} methods, kept {kept}"))
        if "perplexity" in dense:
            facts.append(_fact("dense perplexity", number(dense["perplexity"]), ""))
        return facts
    found = first["metrics"]["compressed"]
    facts.append(_fact("method", shown[0].method, f"kept {first['kept']:g}"))
    if "perplexity" in found:
        before = f"dense {number(dense['perplexity'])}, KL {found['kl']:.3f} nats/token"
        facts.append(_fact("perplexity", number(found["perplexity"]), before))
    small = f"of {first['bytes']['dense'] / 1e6:,.1f} MB on disk"
    facts.append(_fact("size", f"{first['bytes']['compressed'] / 1e6:,.1f} MB", small))
    if registered := first.get("registered"):
        facts.append(_fact("registered", registered["name"], f"version {registered['version']}"))
    return facts


def _fact(name: str, text: str, note: str) -> dict[str, str]:
    return dict(hide_all({"name": name, "text": text, "note": note}))


def _measured(shown: Sequence[Shown]) -> list[Shown]:
    """Those with measures that can be drawn: an exponential may have overflowed."""
    return [
        run
        for run in shown
        if math.isfinite(run.result["metrics"]["compressed"].get("perplexity", math.inf))
    ]


def _quality(shown: Sequence[Shown]) -> list[Part]:
    results = [run.result for run in _measured(shown)]
    if not results:
        return [_text("Nothing was evaluated on text.")]
    text = next(iter(results[0]["metrics"]["dense"]["texts"]))
    note = f"Perplexity on {text}; the star and the dotted line are the dense model."
    top = pictures.highest(results)
    above = sum(run["metrics"]["compressed"]["perplexity"] > top for run in results)
    if above:
        note += f" {above} of {len(results)} runs lie above the picture."
    colours = pictures.colours_of(results)
    if grey := sum(colour == pictures.FAINT for colour in colours.values()):
        note += f" {grey} more methods are grey."
    on_disk = f"{note} Bytes on disk count the places of sparse entries as well."
    return [
        _pictures(
            (pictures.quality(results, "bytes", colours), on_disk),
            (pictures.quality(results, "parameters", colours), note),
        )
    ]


def _prediction(shown: Sequence[Shown]) -> list[Part]:
    runs = _measured(shown)
    colours = pictures.colours_of([run.result for run in shown])
    known = {run.method: run.prediction for run in shown if isinstance(run.prediction, Prediction)}
    parts, made = [], []
    errors = {method: found for method, found in known.items() if found.error is not None}
    if errors:
        caption = (
            "Predicted from the decompositions in the store, without a model: what the cut leaves "
            "of all squared error, each method in the metric it decomposes in. "
            + " ".join(_grouped({method: f"{found.how}." for method, found in errors.items()}))
        )
        made.append((pictures.predicted(shown, colours), caption))
    if runs:
        caption = "KL to the dense model on the first text, as measured."
        if any(found.divergence for found in known.values()):
            caption += " Dotted: what the allocator predicts, on calibration text."
        made.append((pictures.measured(runs, colours), caption))
    if made:
        parts.append(_pictures(*made))
    reasons = {run.method: run.prediction for run in shown if isinstance(run.prediction, str)}
    return parts + _why(reasons)


def _why(reasons: Mapping[str, str]) -> list[Part]:
    """A line per reason, with the methods that it holds for."""
    return [_text(line) for line in _grouped(reasons)]


def _grouped(words: Mapping[str, str]) -> list[str]:
    """What is said, each once, with the names of those it is said of."""
    return [
        f"{', '.join(name for name, own in words.items() if own == said)}: {said}"
        for said in dict.fromkeys(words.values())
    ]


def _allocation(shown: Sequence[Shown]) -> list[Part]:
    known = [run for run in shown if isinstance(run.allocation, Allocation)]
    chosen = known
    if len(known) > MOST_FOLDED:  # the smallest budget of every method says most
        least = {run.method: run for run in sorted(known, key=lambda run: -run.share)}
        chosen = [run for run in known if run is least[run.method]][:MOST_FOLDED]
    parts = []
    for place, run in enumerate(chosen):
        assert isinstance(run.allocation, Allocation)
        picture = pictures.heat_map(run.allocation, place, run.label)
        caption = f"{run.share:.3f} of all compressible parameters is stored; 1 is a dense layer."
        caption += run.allocation.kinds + run.allocation.widths
        parts.append(_folded(run.label, picture, caption, opened=place == 0, wide=True))
    if len(chosen) < len(known):
        parts.append(
            _text(
                f"{len(chosen)} of {len(known)} runs are drawn, methods at their smallest budget; "
                "allocation.csv and allocation.png of every run are in MLflow."
            )
        )
    return parts + _why({r.label: r.allocation for r in shown if isinstance(r.allocation, str)})


def _spectra(shown: Sequence[Shown]) -> list[Part]:
    parts: list[Part] = []
    for method in dict.fromkeys(run.method for run in shown):
        runs = [run for run in shown if run.method == method and pictures.has_kinds(run)]
        if runs and len(parts) < MOST_FOLDED:
            caption = (
                "Singular values in the metric that the method decomposes in. Dots: where "
                f"{_listed(runs)} cuts; a layer without a dot keeps its whole weight."
            )
            if "learn" in runs[0].curves:
                caption += " Which components those are was learned, not the first ones."
            picture = pictures.spectra(runs, len(parts))
            parts.append(_folded(method, picture, caption, opened=not parts, wide=False))
    reasons = {run.method: run.spectra for run in shown if isinstance(run.spectra, str)}
    shared = {
        run.method: "Layers that share an in-factor are decomposed together, which is not drawn."
        for run in shown
        if isinstance(run.spectra, Spectra) and not pictures.has_kinds(run)
    }
    return parts + _why(reasons | shared)


def _listed(runs: Sequence[Shown]) -> str:
    kept = sorted((run.result["kept"] for run in runs), reverse=True)
    return "kept " + ", ".join(f"{one:g}" for one in kept)


def _training(shown: Sequence[Shown]) -> list[Part]:
    parts = []
    for stage, words in (
        ("learn", "What the method itself trained: its budget, and KL to the dense model."),
        ("recover", "The compressed model trained on."),
    ):
        runs = [run for run in shown if stage in run.curves]
        if runs:
            parts.append(_pictures((pictures.training(runs, stage), words)))
    if blocks := [run for run in shown if "blocks" in run.curves]:
        parts.append(_table(blocks_table(blocks)))
    return parts or [_text("Nothing was trained, or its curves are not on record.")]


def _scores(shown: Sequence[Shown]) -> list[Part]:
    table = scores_table([run.result for run in shown])
    return [_table(table) if table else _text("No tasks were asked for; --tasks names some.")]


def _samples(samples: Sequence[Sample] | str) -> list[Part]:
    if isinstance(samples, str):
        return [_text(samples)]
    note = "The likeliest token each time, after the beginnings below."
    made = [
        {"kind": "sample", "prompt": _shown(sample.prompt), "texts": _texts(sample.texts)}
        for sample in samples
    ]
    return [_text(note), *made]


def _texts(texts: Mapping[str, str]) -> dict[str, str]:
    return {who: _shown(text) for who, text in texts.items()}


def _shown(text: str) -> str:
    """Text that a page can hold: control characters are none of it."""
    return hide("".join(sign if sign.isprintable() or sign == "\n" else "�" for sign in text))


def _time(shown: Sequence[Shown]) -> list[Part]:
    table = times_table(shown)
    if table is None:
        return [_text("The records of these runs are not in the data directory.")]
    rows = {run.label: seconds_of(run) for run in shown if run.result.get("stages")}
    parts = [_table(table)]
    if len(rows) <= MOST_BARS:
        parts.insert(0, _pictures((pictures.times(rows), "Seconds that each run spent in stages.")))
    return parts


def _again(shown: Sequence[Shown], commands: Sequence[str]) -> list[Part]:
    parts = [{"kind": "command", "text": hide(command)} for command in commands]
    notes = dict.fromkeys(note for run in shown for note in run.result.get("notes", ()))
    folders = [run.result["model_dir"] for run in shown if run.result.get("model_dir")]
    parts += [_text(f"Note: {note}.") for note in notes]
    return parts + [_text(f"Model folder: {folder}") for folder in folders]
