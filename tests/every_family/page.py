"""docs/models.md: which families are accepted, and why others are not."""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import transformers

from tests.every_family.small import class_of
from tests.every_family.trial import Outcome, State

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"

_HEAD = """# Models

Every model type that `AutoModelForCausalLM` of transformers {version} knows, built small with
random weights and tried. Made by `make families`, which takes a quarter of an hour.

| {states} |
|{rules}|
| {counts} |

* *accepted*: run block by block it gives the whole model's hidden states to the bit; a run makes a
  smaller folder, which loads both ways with the same logits, those of the model with its weights
  replaced.
* *refused*: by that sentence, before a layer is measured. Sizes are those of the small model.
* *not built*: there is no small model to try, for the reason that transformers gives.

| model type | class | | why |
|---|---|---|---|
"""
_ROW = re.compile(r"\| `(\S+)` \| `\w+` \| (\w[\w ]*) \|(?: (.*))? \|")


def render(outcomes: Mapping[str, Outcome]) -> str:
    """The page, model types in the order of their names."""
    states = Counter(outcome.state for outcome in outcomes.values())
    head = _HEAD.format(
        version=transformers.__version__,
        states=" | ".join([*states, "in all"]),
        rules="---|" * len(states) + "---",
        counts=" | ".join(map(str, [*states.values(), len(outcomes)])),
    )
    return head + "".join(
        f"| `{name}` | `{class_of(name)}` | {outcome.state} |{_cell(outcome.why)} |\n"
        for name, outcome in sorted(outcomes.items())
    )


def _cell(why: str) -> str:
    return f" {why}".replace("|", "\\|") if why else ""


def read() -> tuple[str, dict[str, Outcome]]:
    """The version of transformers that the page was made with, and what it says of each type."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    version = re.search(r"of transformers (\S+) knows", text)
    rows: dict[str, Outcome] = {}
    for line in text.splitlines():
        if row := _ROW.fullmatch(line):
            state: State = row[2]  # type: ignore[assignment]
            rows[row[1]] = Outcome(state, (row[3] or "").replace("\\|", "|"))
    return version[1] if version else "", rows
