"""The README's table: one real model, from the results that are on record for it."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "README.md"
MODEL = "smollm2-135m"
HULL = "@hull:probe_windows=4"
ROWS = ("svd", "svd_llm", f"svd_llm{HULL}", "soco", f"saes_svd{HULL}", "sparsegpt")
KEPT = (0.9, 0.8)
NOT_MEASURED = "–"


def render() -> str:
    """The table: perplexity and megabytes on disk, the best perplexity of a column in bold."""
    runs = {
        (run["method"], run["kept"]): run
        for file in sorted((ROOT / "docs" / "results").glob(f"{MODEL}*/results.json"))
        for run in json.loads(file.read_text(encoding="utf-8"))
    }
    dense = next((_cell(run, "dense") for run in runs.values()), NOT_MEASURED)
    best = {kept: _best(runs, kept) for kept in KEPT}
    lines = [
        "| method | " + " | ".join(f"kept {kept:g}" for kept in KEPT) + " |",
        "|---|" + "---|" * len(KEPT),
        f"| dense |{f' {dense} |' * len(KEPT)}",
    ]
    for method in ROWS:
        cells = [
            _cell(runs[method, kept], "compressed", bold=method == best[kept])
            if (method, kept) in runs
            else NOT_MEASURED
            for kept in KEPT
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(run: dict[str, Any], state: str, *, bold: bool = False) -> str:
    found = f"{run['metrics'][state]['perplexity']:.4g}"
    return f"{f'**{found}**' if bold else found} ({run['bytes'][state] / 1e6:.0f} MB)"


def _best(runs: dict[tuple[str, float], dict[str, Any]], kept: float) -> str:
    found = {row: runs[row, kept] for row in ROWS if (row, kept) in runs}
    return min(
        found, key=lambda row: float(found[row]["metrics"]["compressed"]["perplexity"]), default=""
    )
