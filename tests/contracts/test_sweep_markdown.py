"""What a sweep's Markdown says of predictions: beside what was measured, before any recovery."""

import copy
import json
from pathlib import Path

from flows.report.markdown import markdown_table

RUNS = Path(__file__).resolve().parents[2] / "docs/results/stories260K-recovered/results.json"


def test_what_was_predicted_stands_beside_what_was_measured_before_recovery() -> None:
    runs = json.loads(RUNS.read_text())[:2]
    without = markdown_table([{k: v for k, v in run.items() if k != "predicted"} for run in runs])
    assert "predicted" not in without
    first = copy.deepcopy(runs)
    first[0]["predicted"] = 0.1234
    (label, *_) = runs[0]["metrics"]["dense"]["texts"]
    measured = runs[0]["metrics"]["unrecovered"]["texts"][label]["kl"]
    assert measured != runs[0]["metrics"]["compressed"]["texts"][label]["kl"]
    found = markdown_table(first)
    assert f"0.123 → {measured:.3f}" in found and f"as measured on {label}" in found
    assert found.replace(found[found.index("KL to the dense model that") :], "") in without
