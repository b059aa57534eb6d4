"""The table of stages in docs/how-it-works.md, from the table that the code has."""

from pathlib import Path

from tasks.engine.stages import STAGES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-it-works.md"


def render() -> str:
    """A row per kind of unit, and which stages have the memory for themselves."""
    lines = [
        "| stage | unit | what it makes | what is in its key besides code and inputs |",
        "|---|---|---|---|",
    ]
    for stage in STAGES.values():
        names = [f"`{stage.name}`"] + [""] * (len(stage.kinds) - 1)
        lines += [
            f"| {name} | {' | '.join(kind)} |".replace("|  |", "| |")
            for name, kind in zip(names, stage.kinds, strict=True)
        ]
    alone = [f"`{stage.name}`" for stage in STAGES.values() if stage.alone]
    lines += ["", f"No whole model is held beside {', '.join(alone[:-1])} and {alone[-1]}."]
    return "\n".join(lines) + "\n"
