"""`eigenpress store`: look into the store, check it, and free what nothing needs."""

import difflib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress_core.errors import ConfigError
from flows.commands.look import App, Home, Json, said
from flows.settings.belonging import MACHINE
from flows.settings.fields import Fields
from flows.settings.home import check_places, default_home, default_store, use_home
from storage.errors import ArtifactMissingError

if TYPE_CHECKING:
    from storage.gc import GarbageReport
    from storage.lookup import MissingArtifact
    from storage.manifest import Manifest
    from storage.store import Store

store_app = App(name="store", help="Look into the store of artifacts.", no_args_is_help=True)

Address = Annotated[
    str | None,
    said(Fields.model_fields["store"].description or "", "s3://BUCKET/PREFIX", MACHINE, "--store"),
]
Key = Annotated[str, typer.Argument(help="a key, or the beginning of one", metavar="KEY")]


def _home(home: Path | None) -> Path:
    """The data directory, with nothing in the way in it."""
    where = use_home(home or default_home())
    check_places(where)
    return where


def _open(home: Path | None, address: str | None, problems: list[str] | None = None) -> "Store":
    from flows.runs.stores import FOLDER, open_store

    root = _home(home) / FOLDER
    address = address or default_store()
    if address is None and not root.is_dir():
        raise ConfigError(f"there is no store at {root}; choose a data directory with --home")

    def tell(line: str) -> None:
        typer.echo(line, err=True)
        if problems is not None:
            problems.append(line)

    return open_store(root.parent, address, tell)


def _known_stage(store: "Store", stage: str) -> str:
    """A stage that runs have or the store has.

    Raises:
        ConfigError: There is none of that name; it names the nearest.
    """
    from tasks.engine.stages import STAGES

    known = sorted({*STAGES, *store.stages()})
    if stage not in known:
        near = difflib.get_close_matches(stage, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"stages: {', '.join(known)}"
        raise ConfigError(f"there is no stage {stage!r}; {hint}")
    return stage


def _fields(report: "GarbageReport") -> dict[str, Any]:
    """What was freed at one place, in JSON."""
    return {
        "freed_bytes": report.freed_bytes,
        "removed": [_names(manifest) for manifest in report.removed],
        "leftovers": len(report.orphans),
        "kept": report.kept,
    }


def _print(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False))


def _names(manifest: "Manifest | MissingArtifact") -> dict[str, str | None]:
    """An artifact in JSON; of one that is gone the key."""
    return {name: getattr(manifest, name, None) for name in ("key", "stage", "unit")}


@store_app.command("ls")
def list_artifacts(
    stage: Annotated[str | None, typer.Option(help="only this stage", metavar="STAGE")] = None,
    limit: Annotated[
        int, typer.Option(min=1, help="artifacts that are shown (default: 40)", metavar="N")
    ] = 40,
    everything: Annotated[bool, typer.Option("--all", help="show every one")] = False,
    home: Home = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """List artifacts under the runs that made them, newest first.

    A line each: key, stage, size, unit. With --json every artifact is listed.
    """
    from flows.commands.store_list import as_rows, group_artifacts, print_groups
    from flows.runs.records import read_run_records

    store = _open(home, address)
    if stage is not None:
        _known_stage(store, stage)
    records = read_run_records(_home(home), lambda error: typer.echo(str(error), err=True))
    groups = group_artifacts(store.manifests(stage), records)
    if as_json:
        _print(as_rows(groups))
    else:
        print_groups(groups, None if everything else limit)


@store_app.command("show")
def show_artifact(
    key: Key, home: Home = None, address: Address = None, as_json: Json = False
) -> None:
    """Print an artifact's manifest as JSON, with --json or without."""
    typer.echo(_open(home, address).resolve(key).to_json())


@store_app.command("why")
def explain_artifact(
    key: Key, home: Home = None, address: Address = None, as_json: Json = False
) -> None:
    """Show what an artifact was made from, and how it differs from the one made before it."""
    from flows.runs.forecast import say
    from storage.keys import differences

    store = _open(home, address)
    manifest = store.resolve(key)
    earlier = [
        other
        for other in store.candidates(manifest.stage, manifest.unit)
        if other.key != manifest.key and other.created < manifest.created
    ]
    before = max(earlier, key=lambda other: other.created, default=None)
    changes = before and say(differences(before.recipe, manifest.recipe))
    modules = sorted({name.rpartition(".")[0] for name in manifest.recipe["code"]})
    try:
        lineage = store.lineage(manifest.key)
    except ArtifactMissingError:  # removed by another process this moment
        lineage = [manifest]
    if as_json:
        _print(
            {
                **{name: getattr(manifest, name) for name in ("key", "stage", "unit", "created")},
                **{name: manifest.recipe[name] for name in ("settings", "sources")},
                "code": modules,
                "earlier": before and {"key": before.key, "changed": changes},
                "made_from": [_names(source) for source in lineage[1:]],
            }
        )
        return
    typer.echo(
        f"{manifest.key[:12]}  {manifest.stage} · {manifest.unit}  made {manifest.created[:19]}"
    )
    for name, value in manifest.recipe["settings"].items():
        text = str(value)
        typer.echo(f"  setting  {name} = {text if len(text) <= 60 else text[:57] + '…'}")
    for role, digest in manifest.recipe["sources"].items():
        typer.echo(f"  source   {role} = {digest[:12]}")
    typer.echo(f"  code     {', '.join(modules)}")
    if before is not None:
        typer.echo(f"  against {before.key[:12]}: changed {changes}")
    _print_lineage(manifest, lineage)


def _print_lineage(manifest: "Manifest", lineage: "list[Manifest | MissingArtifact]") -> None:
    """A line per artifact that another was made from, further in the further away."""
    from storage.manifest import Manifest

    depth = {manifest.key: 0}
    for entry in lineage:
        if not isinstance(entry, Manifest):
            typer.echo(f"{'  ' * depth.get(entry.key, 1)}{entry.key[:12]}  missing")
            continue
        indent = "  " * depth[entry.key]
        if entry.key != manifest.key:
            typer.echo(f"{indent}{entry.key[:12]}  {entry.stage} · {entry.unit}")
        for upstream in entry.input_keys:
            depth.setdefault(upstream, depth[entry.key] + 1)


@store_app.command("verify")
def verify_artifacts(home: Home = None, address: Address = None, as_json: Json = False) -> None:
    """Check every byte of every artifact; exit code 1 if any is damaged.

    What lies in the store and should not is a problem, too.
    """
    unreadable: list[str] = []  # the store itself adds those whose manifest cannot be read
    store = _open(home, address, unreadable)
    problems: list[dict[str, str | None]] = []
    checked = 0
    for manifest in store.manifests():
        checked += 1
        found = store.check(manifest)
        problems += [{"key": manifest.key, "problem": problem} for problem in found]
        if not as_json:
            for problem in found:
                typer.echo(f"{manifest.key[:12]}  {manifest.stage} · {manifest.unit}: {problem}")
    for path in store.strays():
        problem = f"{path} does not belong into the store: move it away"
        problems.append({"key": None, "problem": problem})
        if not as_json:
            typer.echo(problem)
    problems += [{"key": None, "problem": line} for line in unreadable]
    if as_json:
        _print({"checked": checked, "problems": problems})
    else:
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
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Free what no registered model and no recent run reaches."""
    from flows.server import runtime

    where = _home(home)
    store = _open(home, address)
    runtime.prepare_environment(where)
    from flows.runs.free import free_store, told

    report = free_store(where, store, recent_days, dry_run=dry_run)
    there = report.there
    if as_json:
        _print(
            {
                "dry_run": dry_run,
                **_fields(report),
                **({"bucket": _fields(there)} if there else {}),
            }
        )
        return
    removed = {one.key: one for one in [*report.removed, *(there.removed if there else ())]}
    for manifest in removed.values():
        typer.echo(f"{manifest.key[:12]}  {manifest.stage} · {manifest.unit}")
    typer.echo(told(report, dry_run=dry_run))
