"""Tables of one real model, from the results on record for it: of README and of docs/results."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
README, PAGE = ROOT / "README.md", RESULTS / "README.md"
MODEL = "smollm2-135m"
HULL = "@hull:probe_windows=4"
ROWS = (
    "svd",
    "asvd",
    "svd_llm",
    f"svd_llm{HULL}",
    "svd_llm@importance",
    "svd_llm@fisher",
    "saes_svd@fisher",
    "ada_svd",
    "duo_svd@fisher",
    "soco",
    "wanda",
    "sparsegpt",
    "oats",
    "cap",
)
KEPT = (0.9, 0.8, 0.6, 0.5)
NOT_MEASURED = "–"

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
    runs = recorded(MODEL) | recorded(f"{MODEL}-sparse") | recorded(f"{MODEL}-learned")
    return table(runs, ROWS, KEPT)


def render_all() -> str:
    """Every row on record: perplexity on both texts, KL, megabytes, CPU seconds."""
    parts = []
    for file in sorted(RESULTS.glob(f"{MODEL}*/results.json")):
        runs = recorded(file.parent.name)
        methods = list(dict.fromkeys(method for method, _ in runs))
        budgets = sorted({kept for _, kept in runs}, reverse=True)
        parts.append(f"[{file.parent.name}]({file.parent.name}/table.md):\n")
        parts.append(table(runs, methods, budgets, texts=2))
    return "\n".join(parts)


def table(runs: Runs, rows: Iterable[str], budgets: Iterable[float], texts: int = 1) -> str:
    """Methods in rows, budgets in columns."""
    budgets = list(budgets)
    rows = [row for row in rows if any((row, kept) in runs for kept in budgets)]
    dense = next((cell(run, "dense", texts) for run in runs.values()), NOT_MEASURED)
    best = {kept: _best(runs, rows, kept) for kept in budgets}
    lines = [
        "| method | " + " | ".join(f"kept {kept:g}" for kept in budgets) + " |",
        "|---|" + "---|" * len(budgets),
        f"| dense |{f' {dense} |' * len(budgets)}",
    ]
    for method in rows:
        cells = [
            cell(runs[method, kept], "compressed", texts, bold=method == best[kept])
            if (method, kept) in runs
            else NOT_MEASURED
            for kept in budgets
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cell(run: dict[str, Any], state: str, texts: int, *, bold: bool = False) -> str:
    """Perplexities on the first ``texts`` texts, and megabytes."""
    measured = list(run["metrics"][state]["texts"].values())[:texts]
    found = " / ".join(f"{text['perplexity']:.4g}" for text in measured)
    return f"{f'**{found}**' if bold else found} ({run['bytes'][state] / 1e6:.0f} MB)"


def _best(runs: Runs, rows: Iterable[str], kept: float) -> str:
    found = {row: runs[row, kept] for row in rows if (row, kept) in runs}
    return min(
        found, key=lambda row: float(found[row]["metrics"]["compressed"]["perplexity"]), default=""
    )
