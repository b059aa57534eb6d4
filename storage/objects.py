"""Objects under names: the six verbs that a shared store needs, and a folder that has them.

An object is put whole and read in part. To put one only where there is none (`create`) is all the
locking that there is.
"""

import os
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from storage import disk
from storage.errors import ObjectsError

SCRATCH = ".scratch"
EXTRA = "pip install 'eigenpress[s3]'"
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]")
_PART = re.compile(r"(?!\.\.?$)[A-Za-z0-9._=+-]+")


@dataclass(frozen=True)
class Object:
    """What a listing says of an object.

    Attributes:
        name: its name below the address, parts divided by `/`.
        size: bytes.
        modified: when it was put, with a zone.
        version: another one after every put.
    """

    name: str
    size: int
    modified: datetime
    version: str


class Objects(Protocol):
    """Where objects are kept.

    Where the place cannot be reached, or refuses, every verb raises a StorageError of one sentence;
    of a bucket an ObjectsError.
    """

    @property
    def address(self) -> str:
        """What people call the place; no secret is in it."""

    def create(self, name: str, data: bytes) -> bool:
        """Put an object where there is none; False, and nothing is changed, where there is one."""

    def send(self, name: str, pieces: Iterable[bytes], size: int) -> None:
        """Put an object of `size` bytes, piece by piece; readers see all of it or nothing."""

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Return bytes of an object: fewer than `length` where it ends before.

        Raises:
            FileNotFoundError: there is no such object.
        """

    def stat(self, name: str) -> Object | None:
        """Return what is known of an object; None where there is none."""

    def list(self, below: str) -> Iterator[Object]:
        """Yield the objects whose names begin with `below` and a `/`; all of them for ""."""

    def delete(self, names: Sequence[str]) -> None:
        """Delete objects; those that are not there are none the less."""


def objects_at(address: str, tries: int | None = None) -> Objects:
    """Return the objects at an address; nothing is asked of it yet.

    Args:
        address: `s3://BUCKET/PREFIX`, or `file:///FOLDER`.
        tries: how often a request that fails is repeated; None for the patience of a long run.

    Raises:
        ObjectsError: it is no such address, or what speaks to it is not installed.
    """
    kind, place, prefix = parse_address(address)
    if kind == "file":
        return FolderObjects(Path(prefix))
    try:
        from storage.s3 import s3_objects
    except ImportError:
        raise ObjectsError(f"{address} needs the library obstore: {EXTRA}") from None
    return s3_objects(place, prefix, tries)


def parse_address(address: str) -> tuple[str, str, str]:
    """Split an address into its kind ("s3" or "file"), bucket and prefix (of a file: its path).

    Raises:
        ObjectsError: it is none. Nothing of what may be a secret in it is repeated.
    """
    kinds = "a store is s3://BUCKET/PREFIX or file:///FOLDER"
    try:
        parts = urlsplit(address)
    except ValueError:
        raise ObjectsError(f"{kinds}, and this is no address") from None
    if parts.scheme not in ("s3", "file"):
        got = f"one of {parts.scheme!r}" if parts.scheme else repr(address)
        raise ObjectsError(f"{kinds}, got {got}")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ObjectsError(
            f"a store is named {parts.scheme}://… without user, password or parameters: "
            "credentials are read from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
        )
    if parts.scheme == "file":
        if parts.netloc or not parts.path.strip("/"):
            raise ObjectsError(f"a store in a folder is file:///FOLDER, got {address!r}")
        return "file", "", unquote(parts.path)
    prefix = parts.path.strip("/")
    if not _BUCKET.fullmatch(parts.netloc):
        raise ObjectsError(f"{address!r} names no bucket: a store is s3://BUCKET/PREFIX")
    if prefix and not all(_PART.fullmatch(part) for part in prefix.split("/")):
        raise ObjectsError(
            f"the prefix of {address!r} may have letters, digits and . _ = + - between single '/'"
        )
    return "s3", parts.netloc, prefix


class FolderObjects:
    """Objects as files below a folder: a shared disk, or the tests' stand-in for a bucket.

    Args:
        root: the folder; made when something is put.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root).absolute()

    @property
    def address(self) -> str:
        """The folder as an address."""
        return self.root.as_uri()

    def create(self, name: str, data: bytes) -> bool:
        """Put an object where there is none."""
        target = self._path(name)
        scratch = self._write([data])
        try:
            with disk.writing(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(scratch, target, follow_symlinks=False)  # the one that never replaces
                except FileExistsError:  # and perhaps is not there any more
                    if target.is_dir() or target.is_symlink():
                        raise
                    return False
        finally:
            scratch.unlink(missing_ok=True)
        return True

    def send(self, name: str, pieces: Iterable[bytes], size: int) -> None:
        """Put an object."""
        target = self._path(name)
        scratch = self._write(pieces)
        with disk.writing(target, size):
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(scratch, target)

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Return bytes of an object."""
        try:
            with open(self._path(name), "rb") as file:
                file.seek(start)
                return file.read() if length is None else file.read(length)
        except (NotADirectoryError, IsADirectoryError) as error:
            raise FileNotFoundError(error.errno, error.strerror, error.filename) from None
        except PermissionError as error:
            raise ObjectsError(f"cannot read {error.filename}: {error.strerror}") from None

    def stat(self, name: str) -> Object | None:
        """Return what is known of an object."""
        try:
            found = os.stat(self._path(name))
        except (FileNotFoundError, NotADirectoryError):
            return None
        modified = datetime.fromtimestamp(found.st_mtime, UTC)
        return Object(name, found.st_size, modified, f"{found.st_ino}-{found.st_ctime_ns}")

    def list(self, below: str) -> Iterator[Object]:
        """Yield the objects below a name."""
        for parent, folders, names in os.walk(self._path(below) if below else self.root):
            folders[:] = sorted(name for name in folders if name != SCRATCH)
            for name in sorted(names):
                found = self.stat(Path(parent, name).relative_to(self.root).as_posix())
                if found is not None:  # else deleted this moment
                    yield found

    def delete(self, names: Sequence[str]) -> None:
        """Delete objects, and folders that are left empty."""
        for name in names:
            path = self._path(name)
            with disk.writing(path), suppress(FileNotFoundError, NotADirectoryError):
                path.unlink()

    def _path(self, name: str) -> Path:
        return self.root.joinpath(*name.split("/"))

    def _write(self, pieces: Iterable[bytes]) -> Path:
        scratch = self.root / SCRATCH / secrets.token_hex(8)
        disk.make_folder(scratch.parent)
        with disk.writing(scratch), open(scratch, "xb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        return scratch
