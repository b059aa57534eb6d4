"""Figures as SVG inside a page: text stays text, colours are the page's, nothing is fetched.

matplotlib writes fixed colours; those that stand for something here are exchanged for variables of
the page's style sheet, so that one picture suits light and dark.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from cycler import cycler
from markupsafe import Markup, escape
from matplotlib.figure import Figure

INK, RULE = "#010203", "#010204"  # text and axes; lines of a grid
SERIES = tuple(f"#0102{number:02x}" for number in range(16, 24))
VARIABLES = {INK: "ink", RULE: "rule", "#000000": "ink"}
VARIABLES |= {colour: f"series-{number}" for number, colour in enumerate(SERIES)}
VARIABLES |= {"#b2b2b2": "grey-0", "#808080": "grey-1", "#404040": "grey-2"}  # 0.7, 0.5, 0.25
XMLNS = 'xmlns="http://www.w3.org/2000/svg"'  # the name of a language, which nothing fetches
WIDTH = 4.8  # inches: at 72 points each hardly wider than a phone, so that text keeps its size
FONT = 10  # points, pixels of the picture

_STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": FONT,
    "axes.titlesize": FONT,
    "legend.fontsize": FONT - 1,
    "xtick.labelsize": FONT - 1,
    "ytick.labelsize": FONT - 1,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "lines.markersize": 5,
    "axes.prop_cycle": cycler(color=SERIES),
    "text.parse_math": False,
} | dict.fromkeys(
    ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
)
_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


@contextmanager
def drawing() -> Iterator[None]:
    """The style in which figures have to be drawn that become part of a page."""
    with matplotlib.rc_context(_STYLE):
        yield


def inline(figure: Figure, name: str, title: str) -> Markup:
    """A figure as an element of a page; the same figure gives the same text.

    Args:
        figure: Drawn within :func:`drawing`.
        name: Unlike that of any other figure of the page: its ids are made from it.
        title: What it shows, for those who do not see it.
    """
    written = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(written, format="svg", transparent=True, metadata=_METADATA)
    text = written.getvalue()
    text = text[text.index("<svg") :]  # no declaration, no address of a document type
    text = re.sub(r"<(metadata|style)\b.*?</\1>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<defs>\s*</defs>\s*", "", text)
    text = re.sub(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', rf"<svg {XMLNS} \1>", text, count=1)
    text = text.replace("xlink:href", "href")
    text = re.sub(r'(?<= style=")[^"]*', _style, text)
    text = re.sub(r' transform="rotate\(-?0 [^"]*"', "", text)
    text = re.sub(r'="[^"<>]*"', lambda value: re.sub(r"(\.\d\d)\d+", r"\1", value[0]), text)
    text = re.sub(r"\s*\n\s*", "\n", text)
    used = set(re.findall(r'(?:href="#|url\(#)([\w-]+)', text))
    text = re.sub(
        r'(?<=<)(\w+) id="([^"]*)"', lambda tag: tag[0] if tag[2] in used else tag[1], text
    )
    label = f'<svg role="img" aria-label="{escape(title)}"'
    return Markup(text.strip().replace("<svg", label, 1))  # ours, and matplotlib escapes its text


def _style(found: re.Match[str]) -> str:
    """The style of an element, in the page's font and colours."""
    style = re.sub(r"font: [^;]*?([\d.]+px)[^;]*", r"font-size: \1", found[0])
    style = re.sub(r" ?font-family: [^;]*;?", "", style)
    return re.sub(
        "#[0-9a-f]{6}",
        lambda colour: f"var(--{VARIABLES[colour[0]]})" if colour[0] in VARIABLES else colour[0],
        style,
    )
