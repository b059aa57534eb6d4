"""The command line. Whatever is heavy is imported inside the commands, so that --help is quick."""

import atexit
import gc
import json
import logging
import os
import sys
import threading
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from compress_core.secrets import hide_all
from flows.commands.bench import bench
from flows.commands.export import FORMS
from flows.commands.look import App, Home, Json, UsageError, path_argument, path_option
from flows.commands.mishaps import say, say_in_thread, say_mishap, say_mistake
from flows.commands.promote import add_commands
from flows.commands.push import push
from flows.commands.report import report
from flows.commands.schedules import deploy, up
from flows.commands.serve import serve
from flows.commands.store import store_app
from flows.settings.config import RunConfig, Settings, SweepConfig, build_config
from flows.settings.flags import method_names, offering, with_flags
from flows.settings.home import default_home
from flows.settings.threads import prepare_threads

app = App(name="eigenpress")
app.command("report")(report)
app.add_typer(store_app, no_args_is_help=False)  # or its help would be the error's one line

INTERRUPTED = 130
VERSIONS = ("eigenpress", "torch", "transformers")  # what a report of a fault has to say

ConfigFile = Annotated[
    Path | None,
    path_option("config", "YAML file with any of these settings", "FILE", group="General"),
]


def _show_versions(asked: bool) -> None:
    if asked:
        typer.echo(", ".join(f"{name} {version(name)}" for name in VERSIONS))
        raise typer.Exit


@app.callback()
def program(
    versions: Annotated[
        bool,
        typer.Option(
            "--version",
            help="show the versions of eigenpress, torch and transformers",
            callback=_show_versions,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """Make causal language models smaller by decomposing their weights."""


@app.command()
@with_flags(RunConfig)
def run(given: dict[str, Any], *, config: ConfigFile = None, as_json: Json = False) -> None:
    """Compress, evaluate and register a model: one method, one budget."""
    settings = build_config(RunConfig, given, config)
    result = execute(settings, as_json)
    if as_json:
        print_json(result)


@app.command()
@with_flags(SweepConfig)
def sweep(given: dict[str, Any], *, config: ConfigFile = None, as_json: Json = False) -> None:
    """Run several methods at several budgets; shared work is done once."""
    settings = build_config(SweepConfig, given, config)
    results = execute(settings, as_json)
    if as_json:
        print_json(results)


@app.command()
@with_flags(SweepConfig, RunConfig)
def plan(given: dict[str, Any], *, config: ConfigFile = None, as_json: Json = False) -> None:
    """Say what `run` or `sweep` would compute, and why; compute nothing."""
    from flows.commands.plan import plan_as_run_or_sweep

    plan_as_run_or_sweep(given, config, as_json, print_json)


@app.command()
def methods(
    name: Annotated[
        str | None,
        typer.Argument(
            help="a method or an allocator, to see all of it",
            metavar="NAME",
            autocompletion=offering(method_names),
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the methods and their options, or show one in full."""
    from flows.commands.methods import list_methods, show_method

    if name is None:
        list_methods(as_json, print_json)
    else:
        show_method(name, as_json, print_json)


@app.command()
def export(
    folder: Annotated[Path, path_argument("compressed model folder")],
    to: Annotated[
        str,
        typer.Option(
            help="dense: an ordinary checkpoint of full size; vllm: factors as plain linear "
            "layers, for vLLM's Transformers backend (default: dense)",
            show_default=False,
            metavar="|".join(FORMS),
            autocompletion=offering(lambda: FORMS),
        ),
    ] = FORMS[0],
    output: Annotated[
        Path | None, path_option("output", "folder to write; else DIR-FORM beside it")
    ] = None,
    as_json: Json = False,
) -> None:
    """Turn a compressed folder into another form."""
    from flows.commands.export import export_folder

    target = export_folder(folder, to, output)
    if as_json:
        print_json({to: str(target)})
    else:
        note = "  (same size as the original model)" if to == "dense" else ""
        typer.echo(f"{to:<12} {target}{note}")


app.command()(bench)
app.command()(up)
app.command()(deploy)
app.command()(push)
app.command()(serve)


@app.command()
def demo(home: Home = None, as_json: Json = False) -> None:
    """Train a small Llama, then compress it with several methods.

    It is trained on the documentation and the sources of the Python that runs this.
    """
    where = (home or default_home()).expanduser().absolute()
    start_runtime(where)
    from flows.commands.execute import demo_command

    results = demo_command(where, as_json)
    if as_json:
        print_json(results)


def execute(settings: Settings, as_json: bool) -> Any:
    """Runs a configuration as a Prefect flow; every refusal comes before the flow starts."""
    start_runtime(settings.home.expanduser())
    # Importing makes a million objects that stay: looking through them for garbage, here and at
    # every later collection, takes seconds of a run that has nothing to compute.
    gc.disable()
    from flows.commands.execute import run_command

    gc.freeze()
    gc.enable()
    return run_command(settings, as_json)


def start_runtime(home: Path) -> None:
    """Lets Prefect's server start while everything else is imported and checked."""
    from flows.server import runtime
    from flows.settings.home import open_home

    open_home(home)
    # What goes wrong is said by `main` in one line; Prefect's traceback goes to its server only.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    logging.raiseExceptions = False  # or a log line that its server does not get is told of
    runtime.prepare_environment(home)
    runtime.start_early()


def print_json(value: Any) -> None:
    """One JSON value on stdout."""
    typer.echo(json.dumps(hide_all(value), indent=1, ensure_ascii=False))


add_commands(app, print_json)


def main() -> None:
    """Entry point: one line and a code for whatever goes wrong, 2 for what the user can mend."""
    try:
        threading.excepthook = lambda raised: say_in_thread(raised.exc_value)
        prepare_threads()
        atexit.register(gc.freeze)  # what is left goes with the process: nobody looks through it
        code = app(sys.argv[1:] or ["--help"], prog_name="eigenpress", standalone_mode=False)
        _flush()
    except UsageError as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "eigenpress"
        code = say_mistake(f"{error.format_message()} (see `{command} --help`)")
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:
        code = _leave_quietly()
    except Exception as error:
        code = say_mishap(error)
    if code == INTERRUPTED:  # typer's word for Ctrl-C
        say("interrupted; the same command goes on from here", before="\n")
    sys.exit(code)


def _flush() -> None:
    """What is printed has arrived, or an error says here that it has not, not at Python's end."""
    if sys.stdout is not None:
        sys.stdout.flush()


def _leave_quietly() -> int:
    """For a reader of stdout that has gone, as `head` does: nothing more can be said there."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
