"""`eigenpress push`: a model folder to the HuggingFace hub, with its card."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.commands.look import Home, Json, said
from flows.settings.home import default_home, use_home

MODEL_WORD = "DIR|NAME"


def push(
    model: Annotated[str, typer.Argument(help="model folder or version", metavar=MODEL_WORD)],
    to: Annotated[str, said("repository on the hub", "OWNER/REPO")],
    private: Annotated[bool, said("a new repository is private", None, flag="--private")] = False,
    dry_run: Annotated[bool, said("only say what would go", None, flag="--dry-run")] = False,
    endpoint: Annotated[str | None, said("address of the hub; else HF_ENDPOINT", "URL")] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Upload a model to the HuggingFace hub.

    The token is that of `hf auth login` or HF_TOKEN.
    """
    result = push_model(model, to, private, dry_run, endpoint, use_home(home or default_home()))
    if as_json:
        typer.echo(json.dumps(result, indent=1, ensure_ascii=False))
        return
    for name, size in result["files"].items():
        typer.echo(f"{size:>15,}  {name}")
    for name in result["stays"]:
        typer.echo(f"{'stays here':>15}  {name}")
    amount = f"{len(result['files'])} files, {result['bytes']:,} bytes"
    if dry_run:
        typer.echo(f"would upload {amount} to {to}")
    else:
        typer.echo(f"uploaded {amount}: {result['url']}")


def push_model(
    model: str, to: str, private: bool, dry_run: bool, endpoint: str | None, home: Path
) -> dict[str, Any]:
    """Checks all that can be checked here, then uploads.

    Raises:
        ConfigError, ModelError: Something that was asked for will not do, or the hub refuses.
        TrackingError: The version is not there, or its files are not what was registered.
    """
    from compress_core.hf.hub import check_repository, plan_upload, push_folder
    from flows.runs.referring import folder_or_version
    from tasks.tracking.files import CARD_FILE, CONFIG_FILE, LOADED_AS
    from tasks.tracking.package import PACKAGE_FILES
    from tasks.tracking.versions import check_files

    check_repository(to)
    folder, version = folder_or_version(model, home)
    if version is not None and not check_files(folder, version):
        typer.echo(f"{model}: no digests were kept of its files, so they are not checked", err=True)
    # Settings name places of this machine; what MLflow needs is nothing to the hub.
    stays = (CONFIG_FILE, LOADED_AS, *PACKAGE_FILES)
    upload = plan_upload(folder, stays)
    if CARD_FILE not in upload.names:
        typer.echo(f"{folder} has no {CARD_FILE}: the model has no card there", err=True)
    result: dict[str, Any] = {
        "to": to,
        "folder": str(folder),
        "files": {name: (folder / name).stat().st_size for name in upload.names},
        "bytes": upload.nbytes,
        "stays": [name for name in stays if (folder / name).is_file()],
        "url": None,
    }
    if not dry_run:
        result["url"] = push_folder(upload, to, private=private, endpoint=endpoint)
    return result
