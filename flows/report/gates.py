"""Gates and moves as tables of a page's width."""

from collections.abc import Mapping, Sequence
from typing import Any

from flows.report.lines import entry, make_console
from flows.report.tables import Column, fitted_tables, number
from tasks.promotion.moves import Recorded


def print_gates(gates: Sequence[Mapping[str, Any]]) -> None:
    """A row per limit; below, what there is to say of one beside its numbers."""
    console = make_console()
    keys = [Column("metric", [gate["metric"] for gate in gates], name=True)]
    columns = [
        Column("gate", [gate["rule"] for gate in gates], name=True),
        Column("value", [_number(gate["value"]) for gate in gates]),
        Column("limit", [_number(gate["limit"]) for gate in gates]),
        Column("result", ["kept" if gate["passed"] else "FAILED" for gate in gates]),
    ]
    for table in fitted_tables(keys, columns, console.width):
        console.print(table)
    for gate in gates:
        if gate["why"]:
            entry(console, gate["metric"], gate["why"])


def print_history(moves: Sequence[Recorded]) -> None:
    """A row per move, the newest last."""
    console = make_console()
    keys = [Column("move", [str(one.move.number) for one in moves])]
    columns = [
        Column("when (UTC)", [one.move.when[:16].replace("T", " ") for one in moves]),
        Column("what", [f"{one.move.kind} {one.move.alias}" for one in moves], name=True),
        Column("from", [_version(one.move.source) for one in moves]),
        Column("to", [_version(one.move.target) for one in moves]),
        Column("gates", [_kept(one.move.gates) for one in moves]),
        Column("who", [one.move.who for one in moves], name=True),
    ]
    for table in fitted_tables(keys, columns, console.width):
        console.print(table)
    for one in moves:
        ending = "" if one.ending == "done" else one.ending or "cut short, or going on"
        said = "; ".join(part for part in (one.move.why, ending) if part)
        if said:
            entry(console, f"move {one.move.number}", said)


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}" if value.is_integer() and abs(value) < 1000 else number(value)


def _version(version: int | None) -> str:
    return "–" if version is None else str(version)


def _kept(gates: Sequence[Mapping[str, Any]]) -> str:
    return f"{sum(gate['passed'] for gate in gates)}/{len(gates)}" if gates else "–"
