"""Tables of one real model, from the results on record for it: of README and of docs/results."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flows.report.markdown import grid, scores
from flows.report.spent import HOUR, spent_of

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
README, PAGE = ROOT / "README.md", RESULTS / "README.md"
MODEL = "smollm2-135m"
ROWS = (
    "svd:factors=plain",
    "asvd:factors=plain",
    "svd_llm:factors=plain",
    "ada_svd:factors=plain",
    "svd_llm@importance:factors=plain",
    "svd_llm@fisher:factors=plain",
    "svd_llm@hull:probe_windows=4:factors=plain",
    "svd_llm@fisher:factors=pivot",
    "svd_llm@hull:probe_windows=4:factors=pivot",
    "press:entries=false:correct=false:bits=16",
    "press:correct=false:bits=16",
    "saes_svd:factors=plain",
    "wanda",
    "sparsegpt",
    "oats:factors=plain",
    "cap",
)
KEPT = (0.9, 0.8, 0.6, 0.5)

Runs = dict[tuple[str, float], dict[str, Any]]


def recorded(folder: str) -> Runs:
    """Method and kept to a run, of the folder or, with a pattern, of several."""
    return {
        (run["method"], run["kept"]): run
        for file in sorted(RESULTS.glob(f"{folder}/results.json"))
        for run in json.loads(file.read_text(encoding="utf-8"))
    }


def render_headline() -> str:
    """README's: perplexity on the first text and megabytes on disk, the best of a column bold."""
    runs = recorded(MODEL) | recorded(f"{MODEL}-sparse")
    return table(runs, ROWS, KEPT)


def render_all() -> str:
    """Every row on record: perplexity on both texts and megabytes, and scores of tasks.

    At the end what all of it took.
    """
    parts, together, cold = [], 0.0, 0.0
    for file in sorted(RESULTS.glob(f"{MODEL}*/results.json")):
        runs = recorded(file.parent.name)
        methods = list(dict.fromkeys(method for method, _ in runs))
        budgets = sorted({kept for _, kept in runs}, reverse=True)
        parts.append(f"[{file.parent.name}]({file.parent.name}/table.md):\n")
        parts.append(table(runs, methods, budgets, texts=2))
        if scored := scores(list(runs.values())):
            parts.append("\n".join(scored))
        spent = spent_of(list(runs.values()))
        assert spent is not None, f"{file} does not say what it took"
        together, cold = together + spent[0], cold + spent[1]
    parts.append(
        f"All of these tables took {together / HOUR:.1f} CPU hours, what the runs of a folder "
        f"share counted once; every run by itself, with nothing cached, {cold / HOUR:.1f}.\n"
    )
    return "\n".join(parts)


def table(runs: Runs, rows: Iterable[str], budgets: Sequence[float], texts: int = 1) -> str:
    """Methods in rows, budgets in columns, the dense model first."""
    chosen = [runs[row, kept] for row in rows for kept in budgets if (row, kept) in runs]
    best = {kept: _best([run for run in chosen if run["kept"] == kept]) for kept in budgets}
    _, *lines = grid(
        chosen, lambda run: cell(run, "compressed", texts, bold=run is best[run["kept"]])
    )
    columns = lines[1].count("---|") - 1
    dense = cell(chosen[0], "dense", texts)
    lines.insert(2, f"| dense |{f' {dense} |' * columns}")
    return "\n".join(lines) + "\n"


def cell(run: Mapping[str, Any], state: str, texts: int, *, bold: bool = False) -> str:
    """Perplexities on the first ``texts`` texts, before a recovery, too, and megabytes.

    Of what has components and entries also the part of the layers' numbers that are entries.
    """
    found = perplexities(run, state, texts)
    found = f"**{found}**" if bold else found
    if state == "compressed" and "unrecovered" in run["metrics"]:
        found = f"{perplexities(run, 'unrecovered', texts)} → {found}"
    told = state == "compressed" and "entries" in run
    entries = f", {100 * run['entries']:.0f} % entries" if told else ""
    return f"{found} ({run['bytes'][state] / 1e6:.0f} MB{entries})"


def perplexities(run: Mapping[str, Any], state: str, texts: int) -> str:
    measured = list(run["metrics"][state]["texts"].values())[:texts]
    return " / ".join(f"{text['perplexity']:.4g}" for text in measured)


def _best(runs: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    return min(
        runs, key=lambda run: float(run["metrics"]["compressed"]["perplexity"]), default=None
    )
