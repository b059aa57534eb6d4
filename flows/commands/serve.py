"""`eigenpress serve`: a model answers over HTTP, as OpenAI's clients ask, until it is stopped."""

import json
from typing import Annotated

import typer

from compress_core.secrets import hide_all
from flows.commands.look import Home, Json
from flows.commands.mishaps import say
from flows.settings.belonging import MACHINE
from flows.settings.home import default_home, open_home


def serve(
    model: Annotated[
        str, typer.Argument(help="NAME, NAME@ALIAS, NAME/NUMBER or a folder", metavar="MODEL")
    ],
    follow: Annotated[
        bool,
        typer.Option("--follow", help="serve the other version when the alias moves"),
    ] = False,
    host: Annotated[
        str, typer.Option(help="name or address to listen on", metavar="HOST")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="0 takes a free one", metavar="PORT", min=0, max=65535)
    ] = 8000,
    device: Annotated[
        str,
        typer.Option(help="cpu, cuda, cuda:1 or auto", metavar="DEVICE", rich_help_panel=MACHINE),
    ] = "auto",
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Answer completions and chats over HTTP, as OpenAI's clients ask for them."""
    where = (home or default_home()).expanduser().absolute()
    open_home(where)
    from flows.server import runtime

    runtime.prepare_environment(where)
    from flows.runs.serve import Asked, Ready
    from flows.runs.serve import serve as run

    def ready(there: Ready) -> None:
        if as_json:
            shown = {"url": f"{there.url}/v1", "model": there.name, "log": str(there.log)}
            typer.echo(json.dumps(hide_all(shown), indent=1, ensure_ascii=False))
            return
        typer.echo(f"serving      {there.what}")
        typer.echo(f"ask          {there.url}/v1  (model {there.name!r}; Ctrl-C ends it)")
        typer.echo(f"log          {there.log}")

    run(Asked(where, model, host, port, device, follow), ready, say)
