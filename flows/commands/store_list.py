"""What `store ls` shows: artifacts under the run that made them, newest first."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from flows.report.lines import entry, make_console, say
from flows.runs.records import RunRecord
from storage.manifest import Manifest

NO_RUN = "of no recorded run"


@dataclass(frozen=True)
class Listed:
    """Artifacts of one run: "pico · svd_llm kept 0.6", when it ended, and they, newest first."""

    model: str
    what: str
    created: str
    artifacts: list[Manifest]

    @property
    def nbytes(self) -> int:
        """Of all of them."""
        return sum(manifest.nbytes for manifest in self.artifacts)


def group_artifacts(manifests: Iterable[Manifest], records: Iterable[RunRecord]) -> list[Listed]:
    """Artifacts by the run that computed them, or else used them first; newest first.

    Args:
        manifests: The artifacts.
        records: The runs that are known; what none of them used comes last.
    """
    runs = sorted(records, key=lambda record: record.created)
    owner: dict[str, RunRecord] = {}
    for record in runs:
        for key in record.keys:
            owner.setdefault(key, record)
    for record in runs:
        owner |= {key: record for key, computed in record.keys.items() if computed}
    groups: dict[RunRecord | None, list[Manifest]] = {record: [] for record in reversed(runs)}
    groups[None] = []
    for manifest in sorted(manifests, key=lambda m: (m.created, m.stage, m.unit), reverse=True):
        groups[owner.get(manifest.key)].append(manifest)
    return [
        Listed(
            record.model if record else "",
            record.what if record else NO_RUN,
            record.created.isoformat() if record else "",
            found,
        )
        for record, found in groups.items()
        if found
    ]


def as_rows(groups: Sequence[Listed]) -> list[dict[str, Any]]:
    """A row per artifact, as `--json` prints them."""
    return [
        {
            "key": m.key,
            "stage": m.stage,
            "unit": m.unit,
            "bytes": m.nbytes,
            "created": m.created,
            "model": group.model or None,
            "run": group.what if group.created else None,
        }
        for group in groups
        for m in group.artifacts
    ]


def print_groups(groups: Sequence[Listed], limit: int | None) -> None:
    """A heading per run, a line per artifact and what they come to.

    Args:
        groups: All of them.
        limit: How many artifacts are shown; None for all.
    """
    console = make_console()
    total, left = sum(len(group.artifacts) for group in groups), limit
    for group in groups:
        if left == 0:
            break
        shown = group.artifacts[:left]
        left = None if left is None else left - len(shown)
        when = f"{group.created[:10]} {group.created[11:16]}" if group.created else ""
        size = f"{count(group.artifacts)}, {group.nbytes / 1e6:,.1f} MB"
        say(console, " · ".join(part for part in (group.model, group.what, when, size) if part), 2)
        for m in shown:
            head = f"  {m.key[:12]}  {m.stage:<11} {m.nbytes / 1e6:>9.3f} MB "
            entry(console, head, m.unit, len(head) + 1)
    whole = f"{count([m for group in groups for m in group.artifacts])}, "
    whole += f"{sum(group.nbytes for group in groups) / 1e6:,.1f} MB"
    if limit is not None and total > limit:
        whole += f"; the newest {limit} are shown, --all shows every one"
    say(console, whole)


def count(artifacts: Sequence[Any]) -> str:
    """How many in words."""
    return f"{len(artifacts)} artifact" + ("" if len(artifacts) == 1 else "s")
