"""`eigenpress store`: look into the store, check it, and free what nothing needs."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from compress_core.errors import ConfigError
from flows.commands.look import App, Home, Json
from flows.settings.home import default_home, use_home

store_app = App(name="store", help="Look into the store of artifacts.", no_args_is_help=True)

Key = Annotated[str, typer.Argument(help="a key, or the beginning of one", metavar="KEY")]


def _open(home: Path | None, problems: list[str] | None = None) -> Any:
    from storage.store import Store

    root = use_home(home or default_home()) / "store"
    if not root.is_dir():
        raise ConfigError(f"there is no store at {root}; choose a data directory with --home")

    def tell(line: str) -> None:
        typer.echo(line, err=True)
        if problems is not None:
            problems.append(line)

    return Store(root, on_problem=tell)


@store_app.command("ls")
def list_artifacts(
    stage: Annotated[str | None, typer.Option(help="only this stage", metavar="STAGE")] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """List artifacts: key, stage, unit, size, when."""
    manifests = sorted(_open(home).manifests(stage), key=lambda m: (m.created, m.stage, m.unit))
    if as_json:
        rows = [
            {
                "key": m.key,
                "stage": m.stage,
                "unit": m.unit,
                "bytes": m.nbytes,
                "created": m.created,
            }
            for m in manifests
        ]
        typer.echo(json.dumps(rows, indent=1))
        return
    _print_artifacts(manifests)
    typer.echo(f"{len(manifests)} artifacts, {sum(m.nbytes for m in manifests) / 1e6:,.1f} MB")


def _print_artifacts(manifests: Sequence[Any]) -> None:
    """A line each; when it was made is left out where the line would be too long for it."""
    from flows.report.lines import entry, make_console

    console = make_console()
    heads = [f"{m.key[:12]}  {m.stage:<11} {m.nbytes / 1e6:>9.3f} MB " for m in manifests]
    times = [f"{m.created[:16]}  " for m in manifests]
    longest = max(
        (len(f"{h} {t}{m.unit}") for h, t, m in zip(heads, times, manifests, strict=True)),
        default=0,
    )
    for head, when, m in zip(heads, times, manifests, strict=True):
        body = when + m.unit if longest <= console.width else m.unit
        entry(console, head, body, len(head) + 1)


@store_app.command("show")
def show_artifact(key: Key, home: Home = None) -> None:
    """Print an artifact's manifest as JSON."""
    typer.echo(_open(home).resolve(key).to_json())


@store_app.command("why")
def explain_artifact(key: Key, home: Home = None) -> None:
    """Show what an artifact was made from, and how it differs from the one made before it."""
    from flows.runs.forecast import say
    from storage.keys import differences
    from storage.manifest import Manifest

    store = _open(home)
    manifest = store.resolve(key)
    typer.echo(
        f"{manifest.key[:12]}  {manifest.stage} · {manifest.unit}  made {manifest.created[:19]}"
    )
    for name, value in manifest.recipe["settings"].items():
        text = str(value)
        typer.echo(f"  setting  {name} = {text if len(text) <= 60 else text[:57] + '…'}")
    for role, digest in manifest.recipe["sources"].items():
        typer.echo(f"  source   {role} = {digest[:12]}")
    modules = sorted({name.rpartition(".")[0] for name in manifest.recipe["code"]})
    typer.echo(f"  code     {', '.join(modules)}")
    earlier = [
        other
        for other in store.candidates(manifest.stage, manifest.unit)
        if other.key != manifest.key and other.created < manifest.created
    ]
    if earlier:
        before = max(earlier, key=lambda other: other.created)
        changes = say(differences(before.recipe, manifest.recipe))
        typer.echo(f"  against {before.key[:12]}: changed {changes}")
    depth = {manifest.key: 0}
    for entry in store.lineage(manifest.key):
        if not isinstance(entry, Manifest):
            typer.echo(f"{'  ' * depth.get(entry.key, 1)}{entry.key[:12]}  missing")
            continue
        indent = "  " * depth[entry.key]
        if entry.key != manifest.key:
            typer.echo(f"{indent}{entry.key[:12]}  {entry.stage} · {entry.unit}")
        for upstream in entry.input_keys:
            depth.setdefault(upstream, depth[entry.key] + 1)


@store_app.command("verify")
def verify_artifacts(home: Home = None) -> None:
    """Check every byte of every artifact; exit code 1 if any is damaged."""
    problems: list[str] = []  # the store itself adds those whose manifest cannot be read
    store = _open(home, problems)
    checked = 0
    for manifest in store.manifests():
        checked += 1
        for problem in store.check(manifest):
            problems.append(problem)
            typer.echo(f"{manifest.key[:12]}  {manifest.stage} · {manifest.unit}: {problem}")
    typer.echo(f"{checked} artifacts checked, {len(problems)} problems")
    if problems:
        raise typer.Exit(1)


@store_app.command("gc")
def free_artifacts(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would go")] = False,
    recent_days: Annotated[
        float, typer.Option(help="runs newer than this keep what they made", metavar="N")
    ] = 14.0,
    home: Home = None,
) -> None:
    """Free what no registered model and no recent run reaches."""
    from flows.server import runtime
    from storage.gc import collect_garbage
    from tasks.tracking import client as tracking

    store = _open(home)
    where = (home or default_home()).expanduser()
    runtime.prepare_environment(where)
    registered = tracking.registered_keys(where)  # beginnings of keys
    lengths = {len(beginning) for beginning in registered}
    roots = recent_keys(where, recent_days) | {
        key
        for _, key, _ in store.layout.artifacts()
        if any(key[:length] in registered for length in lengths)
    }
    report = collect_garbage(store, roots, dry_run=dry_run)
    word = "would free" if dry_run else "freed"
    for manifest in report.removed:
        typer.echo(f"{manifest.key[:12]}  {manifest.stage} · {manifest.unit}")
    typer.echo(
        f"{word} {report.freed_bytes / 1e6:,.1f} MB: {len(report.removed)} artifacts, "
        f"{len(report.orphans)} leftovers of runs that ended early; {report.kept} artifacts stay"
    )


def recent_keys(home: Path, days: float) -> set[str]:
    """Keys of everything that runs of the last ``days`` days used."""
    since = datetime.now(UTC) - timedelta(days=days)
    keys = set()
    for file in (home / "runs").glob("*.json"):
        record = json.loads(file.read_text(encoding="utf-8"))
        if datetime.fromisoformat(record["created"]) >= since:
            keys |= {s["key"] for s in record["result"]["stages"] if s["name"] != "register"}
    return keys
