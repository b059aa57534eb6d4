"""`eigenpress report`: one page on a run or a sweep, made of what is on record."""

import json
from pathlib import Path
from typing import Annotated

import typer

from flows.commands.look import Home, Json, path_option
from flows.settings.belonging import EVALUATION, OUTPUT
from flows.settings.home import check_places, default_home, use_home


def report(
    asked: Annotated[
        str | None,
        typer.Argument(
            help="a run or a sweep: its name or the beginning of it, an MLflow run's id, NAME, "
            "NAME/VERSION or NAME@ALIAS, a model folder, or a sweep's report; else the newest",
            metavar="RUN|SWEEP",
        ),
    ] = None,
    generate: Annotated[
        int,
        typer.Option(
            min=0,
            max=100,
            help="beginnings from the evaluation text that the models go on from; 0 is none "
            "(default: 2)",
            metavar="N",
            show_default=False,
            rich_help_panel=EVALUATION,
        ),
    ] = 2,
    prompt: Annotated[
        list[str],
        typer.Option(
            "--prompt",
            help="a beginning in their place (repeated for more)",
            metavar="TEXT",
            rich_help_panel=EVALUATION,
        ),
    ] = [],  # noqa: B006  typer makes a new one each time
    output: Annotated[
        Path | None,
        path_option("output", "where the page goes; else below reports/", "FILE", OUTPUT),
    ] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Write a page on a run or a sweep: quality, sizes, spectra, times.

    It is one HTML file, without scripts, and goes to MLflow as well.
    """
    where = use_home(home or default_home())
    check_places(where)
    from flows.server import runtime

    runtime.prepare_environment(where)
    from flows.report.console import Reporter
    from flows.runs.page import check_page, make_page

    target = check_page(output)
    reporter = Reporter(stderr=as_json)
    made = make_page(where, asked, target, generate, prompt, reporter)
    if as_json:
        typer.echo(json.dumps(made.as_json(), indent=1, ensure_ascii=False))
