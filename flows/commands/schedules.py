"""`eigenpress up` and `eigenpress deploy` as the command line has them: schedules."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from compress_core.errors import ConfigError
from flows.commands.look import Home, Json, path_argument
from flows.settings.config import RunConfig, SweepConfig, build_config
from flows.settings.home import default_home


def _port(of: str, default: int) -> Any:
    text = f"port of {of}; 0 is any that is free (default: {default})"
    return typer.Option(help=text, min=0, max=65535, metavar="PORT", show_default=False)


def up(
    prefect_port: Annotated[int, _port("Prefect's server and page", 4200)] = 4200,
    mlflow_port: Annotated[int, _port("MLflow's page", 5000)] = 5000,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Start what schedules need, and end it again: Prefect, a worker, MLflow.

    All on the loopback. With PREFECT_API_URL set, the worker is that server's.
    """
    from flows.commands.cli import print_json
    from flows.commands.up import run_together
    from flows.settings.home import open_home

    where = (home or default_home()).expanduser().absolute()
    open_home(where)
    run_together(where, prefect_port, mlflow_port, as_json, print_json)


def deploy(
    config: Annotated[Path, path_argument("YAML file with the settings of a run or sweep", "FILE")],
    cron: Annotated[
        str | None,
        typer.Option(help='schedule, like "0 2 * * *"; else it runs when started', metavar="CRON"),
    ] = None,
    every: Annotated[
        str | None, typer.Option(help="interval, like 90s, 30m, 6h or 1d", metavar="TIME")
    ] = None,
    timezone: Annotated[
        str | None,
        typer.Option(help="of --cron, like Europe/Berlin (default: UTC)", metavar="ZONE"),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="name of the deployment; else the file's", metavar="NAME"),
    ] = None,
    notify: Annotated[
        str | None,
        typer.Option(
            help="gets a POST with JSON when a run fails or crashes; else EIGENPRESS_NOTIFY",
            metavar="URL",
        ),
    ] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Run a configuration on a schedule, by the worker of `eigenpress up`.

    All that a run would refuse is refused now. A name that is there already is changed.
    """
    from flows.server import runtime
    from flows.server.deploying import When
    from flows.settings.home import open_home
    from flows.settings.reading import read_yaml
    from flows.settings.words import check_word

    where = {"home": home} if home else {}
    kind = RunConfig if read_yaml(config).get("methods") is None else SweepConfig
    settings = build_config(kind, where, config)
    place = settings.home.expanduser()
    name = name or config.stem
    check_word("--name", name)
    if set(name) & set("/%&<>"):
        raise ConfigError(f"--name {name!r} is no name of a deployment: it holds /, %, &, < or >")
    open_home(place)
    runtime.prepare_environment(place)
    from flows.commands.cli import print_json
    from flows.commands.deploy import deploy_config

    when, notify = When(cron, every, timezone), notify or os.environ.get("EIGENPRESS_NOTIFY")
    deploy_config(settings, name, when, notify, as_json, print_json)
