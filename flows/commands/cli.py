"""The command line. Whatever is heavy is imported inside the commands, so that --help is quick."""

import atexit
import gc
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from compress_core.errors import CompressError, ConfigError
from compress_core.secrets import hide, hide_all
from flows.commands.store import store_app
from flows.settings.config import RunConfig, Settings, SweepConfig, build_config, default_home
from flows.settings.flags import with_flags
from flows.settings.threads import prepare_threads
from storage.errors import StorageError

app = typer.Typer(
    name="eigenpress",
    help="Make causal language models smaller by decomposing their weights.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its boxes leave a quarter of the line to the descriptions
)
app.add_typer(store_app, no_args_is_help=False)  # or its help would be the error's one line

INTERRUPTED = 130
UsageError: Any = typer.BadParameter.__base__  # which module it is in depends on typer's version

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="YAML file with any of these settings", metavar="PATH"),
]
Json = Annotated[bool, typer.Option("--json", help="print JSON on stdout and nothing else there")]


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
def methods(as_json: Json = False) -> None:
    """List the methods and their options."""
    from flows.commands.methods import list_methods

    list_methods(as_json, print_json)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="compressed model folder", metavar="DIR")],
    to: Annotated[str, typer.Option(help="dense: an ordinary checkpoint, full size")] = "dense",
    output: Annotated[Path | None, typer.Option(help="folder to write", metavar="DIR")] = None,
) -> None:
    """Turn a compressed folder into another form."""
    if to != "dense":
        raise ConfigError(f"cannot export to {to!r}; forms: dense")
    from compress_core.hf.export import to_dense

    target = output or folder.with_name(f"{folder.resolve().name}-dense")
    to_dense(folder, target)
    typer.echo(f"dense        {target}  (same size as the original model)")


@app.command()
def demo(
    home: Annotated[Path | None, typer.Option(help="data directory", metavar="DIR")] = None,
    as_json: Json = False,
) -> None:
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
    runtime.prepare_environment(home)
    runtime.start_early()


def print_json(value: Any) -> None:
    """One JSON value on stdout."""
    sys.stdout.write(json.dumps(hide_all(value), indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    """Entry point: one line and exit code 2 for what the user can mend."""
    prepare_threads()
    atexit.register(gc.freeze)  # what is left goes with the process: nobody has to look through it
    try:
        code = app(sys.argv[1:] or ["--help"], prog_name="eigenpress", standalone_mode=False)
    except UsageError as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "eigenpress"
        _fail(f"{error.format_message()} (see `{command} --help`)")
    except (CompressError, StorageError) as error:
        _fail(error)
    except RuntimeError as error:
        if type(error).__module__.partition(".")[0] not in ("flows", "tasks"):
            raise
        _fail(error)
    if code == INTERRUPTED:  # typer's word for Ctrl-C
        sys.stderr.write("\neigenpress: interrupted; the same command goes on from here\n")
    sys.exit(code)


def _fail(error: Exception | str) -> NoReturn:
    sys.stderr.write(f"eigenpress: {' '.join(hide(str(error)).split())}\n")
    sys.exit(2)
