"""`promote`, `rollback` and `history`: what people see of a registered model's aliases."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.commands.look import App, Home, Json, path_option
from flows.commands.mishaps import say
from flows.settings.belonging import EVALUATION

FAILED = 1

Name = Annotated[str, typer.Argument(help="name in the model registry", metavar="NAME")]
Why = Annotated[str, typer.Option("--why", help="a reason, for the record", metavar="TEXT")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="move and record nothing")]


def add_commands(app: App, print_json: Any) -> None:
    """Hooks the three commands into the command line.

    Args:
        app: The command line.
        print_json: Prints one JSON value on stdout.
    """

    @app.command()
    def promote(
        name: Name,
        version: Annotated[
            str,
            typer.Option(
                help="a number, latest, best:METRIC or an alias (default: latest)",
                metavar="WHICH",
                show_default=False,
            ),
        ] = "latest",
        to: Annotated[
            str,
            typer.Option(
                help="alias that is moved (default: champion)", metavar="ALIAS", show_default=False
            ),
        ] = "champion",
        gates: Annotated[
            Path | None,
            path_option("gates", "YAML file of limits; else the defaults", "FILE", EVALUATION),
        ] = None,
        measure: Annotated[
            bool,
            typer.Option(
                "--measure",
                help="measure again what cannot be compared with the champion's",
                rich_help_panel=EVALUATION,
            ),
        ] = False,
        why: Why = "",
        dry_run: DryRun = False,
        trust_remote_code: Annotated[
            bool,
            typer.Option(
                "--trust-remote-code",
                help="let the model folder's own Python run",
                rich_help_panel=EVALUATION,
            ),
        ] = False,
        home: Home = None,
        as_json: Json = False,
    ) -> None:
        """Move an alias to a version that keeps its gates; exit code 1 where one fails.

        Gates are limits on what its run measured, absolute or relative to the dense model and the
        champion: docs/promotion.md.
        """
        from flows.runs.promotion import Asked
        from flows.runs.promotion import promote as promote_version
        from flows.settings.gates import read_gates

        limits = read_gates(gates)
        asked = Asked(
            _opened(home), name, limits, version, to, why, dry_run, measure, trust_remote_code
        )
        result = _unless_held(lambda: promote_version(asked, _tell), as_json, print_json)
        if as_json:
            print_json(result)
        else:
            _show_promotion(result, dry_run)
        if not result["passed"]:
            failed = sum(not gate["passed"] for gate in result["gates"])
            said = f"{name} version {result['version']}: {failed} of {len(result['gates'])} gates"
            say(f"{said} failed; nothing was moved")
            raise typer.Exit(FAILED)

    @app.command()
    def rollback(
        name: Name,
        why: Why = "",
        dry_run: DryRun = False,
        home: Home = None,
        as_json: Json = False,
    ) -> None:
        """Move champion back to the version before it; twice goes back twice."""
        from flows.runs.promotion import roll_back

        where = _opened(home)
        result = _unless_held(
            lambda: roll_back(where, name, why, dry_run, _tell), as_json, print_json
        )
        if as_json:
            print_json(result)
        else:
            typer.echo(_moved(result, dry_run))

    @app.command()
    def history(name: Name, home: Home = None, as_json: Json = False) -> None:
        """List every move of a model's aliases: who, when, from, to, gates, why."""
        from dataclasses import asdict

        from flows.runs.promotion import history as read_moves

        moves = read_moves(_opened(home), name)
        if as_json:
            print_json([{**asdict(one.move), "ending": one.ending or "begun"} for one in moves])
        else:
            _show_history(name, moves)


def _opened(home: Path | None) -> Path:
    """The data directory, and MLflow's environment."""
    from flows.server import runtime
    from flows.settings.home import check_places, default_home, use_home

    where = use_home((home or default_home()).absolute())
    check_places(where)
    runtime.prepare_environment(where)
    return where


def _tell(line: str) -> None:
    typer.echo(line, err=True)


def _unless_held(work: Any, as_json: bool, print_json: Any) -> dict[str, Any]:
    """What the work returns; exit code 1 where another promotion was faster."""
    from tasks.promotion.lease import HeldError

    try:
        found: dict[str, Any] = work()
        return found
    except HeldError as error:
        if as_json:
            print_json({"moved": False, "why": str(error)})
        say(str(error))
        raise typer.Exit(FAILED) from None


def _show_promotion(result: Mapping[str, Any], dry_run: bool) -> None:
    from flows.report.gates import print_gates

    print_gates(result["gates"])
    if result["passed"]:
        typer.echo(_moved(result, dry_run))


def _moved(result: Mapping[str, Any], dry_run: bool) -> str:
    name, alias, version, before = (result[key] for key in ("name", "alias", "version", "from"))
    if before == version:
        return f"{name}: {alias} is version {version} already; nothing was moved"
    was = f" from version {before}" if before is not None else ""
    if dry_run:
        return f"{name}: {alias} would move{was} to version {version}"
    return f"{name}: {alias} moved{was} to version {version} (move {result['move']})"


def _show_history(name: str, moves: Sequence[Any]) -> None:
    from flows.report.gates import print_history

    if moves:
        print_history(moves)
    else:
        typer.echo(f"no alias of {name} was moved yet; `eigenpress promote {name}` does")
