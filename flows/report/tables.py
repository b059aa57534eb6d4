"""Tables that fit the width there is: wide ones become several, long names wrap in their column."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

GAP = 2  # blanks between columns
NAME = 16  # width that a long name gets before columns go to a further table


@dataclass(frozen=True)
class Column:
    """One column: its heading and a cell per row; ``name`` cells wrap, others stay whole."""

    heading: str
    cells: Sequence[str]
    name: bool = False

    @property
    def whole(self) -> int:
        """Width that holds every cell and every word of the heading in one piece."""
        return max(map(len, [*self.heading.split(), *self.cells]))

    @property
    def least(self) -> int:
        """Width that it needs before others go to a further table."""
        return min(self.whole, NAME) if self.name else self.whole


def fitted_tables(keys: Sequence[Column], columns: Sequence[Column], width: int) -> list[Table]:
    """As few tables as hold all columns, in order; every one begins with the keys.

    Args:
        keys: Say what a row is about.
        columns: What is said of it, the most important first.
        width: Characters in a line.
    """
    least = sum(key.least + GAP for key in keys)
    shares: list[list[Column]] = []
    used = width + 1
    for column in columns:
        used += GAP + column.least
        if used > width:
            shares.append([])
            used = least + column.least
        shares[-1].append(column)
    return [_table([*keys, *share], width) for share in shares]


def _table(columns: Sequence[Column], width: int) -> Table:
    """One table; names get what the others leave."""
    spare = width - sum(column.least + GAP for column in columns) + GAP
    table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False)
    cells = []
    for column in columns:
        wide = column.least
        if column.name:
            wide = max(1, min(column.whole, wide + spare))
            spare -= wide - column.least
        justify: Any = "left" if column.name else "right"
        table.add_column(
            column.heading, width=wide, justify=justify, overflow="fold", no_wrap=False
        )
        # Padded here: rich would take blanks from the ends, and so the points out of line.
        cells.append(
            [
                Text(wrap_name(cell, wide) if column.name else cell.rjust(wide), justify="left")
                for cell in column.cells
            ]
        )
    for row in zip(*cells, strict=True):
        table.add_row(*row)
    return table


def wrap_name(name: str, width: int) -> str:
    """A name in lines of at most ``width``, broken between options, else wherever it has to."""
    lines = [""]
    for option in re.findall("[^:+@]+[:+@]*", name):
        for part in [option] if len(option) <= width else re.findall("[^=]+=?", option):
            if lines[-1] and len(lines[-1]) + len(part) > width:
                lines.append("")
            lines[-1] += part
            while len(lines[-1]) > width:
                lines[-1:] = [lines[-1][:width], lines[-1][width:]]
    return "\n".join(lines)


def number(value: float) -> str:
    """Four significant digits; thousands whole, and an exponent only from 10⁹ on."""
    if not abs(value) < 1e9:
        return f"{value:.3e}"
    return f"{value:#,.4g}".rstrip(".") if abs(value) < 999.95 else f"{value:,.0f}"


def aligned(numbers: Sequence[str]) -> list[str]:
    """The same numbers, padded so that points stand below one another; exponents are left alone."""
    plain = [len(text.partition(".")[2]) + ("." in text) for text in numbers if "e" not in text]
    most = max(plain, default=0)
    behind = [most if "e" in text else len(text) - len(text.partition(".")[0]) for text in numbers]
    return [text + " " * (most - digits) for text, digits in zip(numbers, behind, strict=True)]


def sweep_tables(results: Sequence[Mapping[str, Any]], width: int) -> list[Table]:
    """Method, kept, perplexity and KL per text, scores, sizes, seconds and what was reused."""
    keys = [
        Column("method", [run["method"] for run in results], name=True),
        Column("kept", aligned([f"{run['kept']:g}" for run in results])),
    ]
    measured = [run["metrics"]["compressed"] for run in results]
    columns = []
    labels = list(measured[0]["texts"])
    for place, label in enumerate(labels, start=1):
        of = f" text {place}" if len(labels) > 1 else ""
        texts = [found["texts"][label] for found in measured]
        columns += [
            Column(f"perplexity{of}", aligned([number(text["perplexity"]) for text in texts])),
            Column(f"KL{of}", [f"{text['kl']:.3f}" for text in texts]),
        ]
    for task in measured[0]["tasks"]:
        columns.append(Column(task, [_main_score(found["tasks"][task]) for found in measured]))
    if any("entries" in run for run in results):
        columns.append(Column("% of it entries", [kind_part(run) or "–" for run in results]))
    for heading, what, digits in (
        ("million parameters", "parameters", 2),
        ("MB on disk", "bytes", 1),
        ("MB in memory", "memory", 1),
    ):
        values = [f"{run[what]['compressed'] / 1e6:,.{digits}f}" for run in results]
        columns.append(Column(heading, values))
    columns.append(Column("s", [f"{run['seconds']:,.1f}" for run in results]))
    columns.append(Column("reused", [_reused(run) for run in results]))
    return fitted_tables(keys, columns, width)


def kind_part(result: Mapping[str, Any], kind: str = "entries") -> str:
    """Which part of its layers' numbers is of a kind, in percent; "" where none or all are."""
    return f"{100 * result[kind]:.1f}" if kind in result else ""


def _main_score(scores: Mapping[str, float]) -> str:
    """Accuracy where the task has one, else its first metric."""
    return f"{scores.get('acc', next(iter(scores.values()))):.3f}"


def _reused(run: Mapping[str, Any]) -> str:
    stages = run["stages"]
    return f"{sum(stage['state'] == 'cached' for stage in stages)}/{len(stages)}"
