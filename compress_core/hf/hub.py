"""A model folder to the HuggingFace hub: what goes, what must not, and one commit of it."""

import fnmatch
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_session,
    get_token,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from compress_core.errors import ConfigError, ModelError
from compress_core.hf.inside import inside
from compress_core.secrets import hide

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib", "*.npy", "*.npz")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
# With what its HTTP library raises, whichever that is.
_FAILURES: tuple[type[Exception], ...] = (OSError, RuntimeError, ValueError)
_FAILURES += HfHubHTTPError.__bases__
CONNECT = 10.0  # seconds for a connection
ANSWER = 120.0  # seconds without a byte, in the middle of an upload


@dataclass(frozen=True)
class Upload:
    """What goes.

    Attributes:
        folder: Where the files are.
        names: Paths inside it, with ``/``, sorted.
        nbytes: Of all of them.
    """

    folder: Path
    names: tuple[str, ...]
    nbytes: int


def plan_upload(folder: Path, private: Sequence[str]) -> Upload:
    """The files of a model folder that others need.

    Args:
        folder: The model's.
        private: Names that stay here; hidden files and compiled Python do, too.

    Raises:
        ModelError: It is no model folder, holds what only unpickling reads, or a link out of it.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is no model folder: it has no config.json")
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    names = {file.relative_to(folder).as_posix(): file for file in files}
    pickles = [n for n in names if any(fnmatch.fnmatch(n.lower(), kind) for kind in PICKLES)]
    if pickles:
        raise ModelError(
            f"{folder} holds {pickles[0]}, which is read by unpickling and so could run anything: "
            "only safetensors are shared; move it away"
        )
    going = [n for n in names if not _stays(n, private)]
    if not any(name.endswith(".safetensors") for name in going):
        raise ModelError(f"{folder} is no model folder: it has no safetensors")
    for name in going:
        inside(folder, names[name])
    return Upload(folder, tuple(going), sum(names[name].stat().st_size for name in going))


def _stays(name: str, private: Sequence[str]) -> bool:
    parts = name.split("/")
    return name in private or any(part.startswith((".", "__pycache__")) for part in parts)


def check_repository(name: str) -> None:
    """Refuses what is no ``OWNER/REPO``.

    Raises:
        ConfigError: It is none.
    """
    try:
        validate_repo_id(name)
    except HFValidationError:
        name = ""
    if name.count("/") != 1:
        raise ConfigError("--to is OWNER/REPO on the hub, like me/my-llama-small")


def push_folder(
    upload: Upload, to: str, *, private: bool, endpoint: str | None, quiet: bool = False
) -> str:
    """Makes the repository where it is absent, and uploads in one commit.

    Weight files there that are no part of the folder are removed by the same commit, so that
    nobody loads half of an older model.

    Args:
        upload: What goes.
        to: OWNER/REPO.
        private: Whether only its owner sees a repository that is new.
        endpoint: Address of the hub; else HF_ENDPOINT, else HuggingFace's.
        quiet: No bars.

    Returns:
        The commit's address.

    Raises:
        ConfigError: There is no token, no network, or the hub refuses.
    """
    where = (endpoint or constants.ENDPOINT).rstrip("/")
    if constants.is_offline_mode():
        raise ConfigError("HF_HUB_OFFLINE is set: unset it to push, or use --dry-run")
    if quiet:
        disable_progress_bars()
    session = get_session()  # which else waits for ever where nobody answers
    session.timeout = type(session.timeout)(ANSWER, connect=CONNECT)
    with _speaking(where, to):
        token = get_token()
        if not token:
            raise ConfigError("no token for the hub: `hf auth login`, or set HF_TOKEN")
        api = HfApi(endpoint=where, token=token)
        api.create_repo(to, private=private or None, exist_ok=True)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(name, upload.folder / name) for name in upload.names
        ]
        for name in api.list_repo_files(to):
            if _is_weight(name) and name not in upload.names:
                operations.append(CommitOperationDelete(name))
        commit = api.create_commit(to, operations, commit_message="Upload by eigenpress")
        return str(commit.commit_url)


def _is_weight(name: str) -> bool:
    return any(fnmatch.fnmatch(name, kind) for kind in WEIGHTS)


@contextmanager
def _speaking(where: str, to: str) -> Iterator[None]:
    """Errors of the hub as one line of ours."""
    try:
        yield
    except ConfigError:
        raise
    except HfHubHTTPError as error:
        code = getattr(getattr(error, "response", None), "status_code", None)
        reasons = {
            401: "it does not accept the token: `hf auth login` again, or set another HF_TOKEN",
            403: "the token may not write there: it needs the right to write, and yours is REPO's "
            "owner",
        }
        reason = reasons.get(code or 0) or hide(" ".join(str(error).split()))
        raise ConfigError(f"{hide(where)} refuses the upload to {to}: {reason}") from error
    except _FAILURES as error:
        reason = hide(" ".join(str(error).split())) or type(error).__name__
        raise ConfigError(
            f"cannot upload to {to} on {hide(where)}: {reason}; is there a network?"
        ) from error
