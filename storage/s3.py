"""Objects in a bucket of S3, or of whatever speaks as it does, by obstore.

Endpoint, region and credentials are those of the environment (AWS_*). What the library says of an
error may hold names of keys and signatures, so only its code is passed on.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import ObjectStore, S3Store

from storage.errors import ObjectsError
from storage.objects import Object

TRIES = 8
"""Of a request in the middle of a run, half a minute in all."""

PART = 16 << 20
MOST_PARTS = 9_000  # S3 takes 10,000
REQUEST_SECONDS = 600  # no request moves more than a part, so this is a very slow line
_NO_KEY = re.compile(r"/latest/(api/token|meta-data)")
"""What the library asks the machine for where the environment has no key."""
NO_BUCKET = "NoSuchBucket"
_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_STATUS = re.compile(r"status code: (\d{3})")


def s3_objects(bucket: str, prefix: str, tries: int | None = None) -> "LibraryObjects":
    """Return the objects below a prefix of a bucket; nothing is asked of it yet.

    Args:
        bucket: its name.
        prefix: what all names begin with; "" for none.
        tries: how often a request that fails is repeated; None for `TRIES`.

    Raises:
        ObjectsError: the environment has half a key, or settings that are none.
    """
    address = f"s3://{bucket}" + (f"/{prefix}" if prefix else "")
    missing = [name for name in _KEYS if not os.environ.get(name)]
    if len(missing) == 1:
        raise ObjectsError(f"{address}: {missing[0]} is not set in the environment")
    endpoint = next((os.environ[x] for x in _ENDPOINTS if os.environ.get(x)), "")
    host = urlsplit(endpoint).netloc.rpartition("@")[2]
    where = f"{address} at {host}" if host else address
    try:
        store = S3Store(
            bucket,
            prefix=prefix or None,
            client_options={
                "allow_http": endpoint.startswith("http://"),  # who says so means it
                "connect_timeout": timedelta(seconds=5),
                "timeout": timedelta(seconds=REQUEST_SECONDS),
            },
            retry_config={
                "max_retries": TRIES if tries is None else tries,
                "backoff": {
                    "init_backoff": timedelta(seconds=0.2),
                    "max_backoff": timedelta(seconds=10),
                },
            },
        )
    except (BaseError, ValueError) as error:
        raise ObjectsError(f"{where}: {_reason(str(error))}") from None
    return LibraryObjects(store, address, where)


class LibraryObjects:
    """Objects in a store of the library's.

    Args:
        store: it.
        address: what people call it.
        where: the same for messages, with the endpoint that is asked.
    """

    def __init__(self, store: ObjectStore, address: str, where: str) -> None:
        self._store = store
        self._address = address
        self._where = where

    @property
    def address(self) -> str:
        """Bucket and prefix."""
        return self._address

    def create(self, name: str, data: bytes) -> bool:
        """Put an object where there is none (If-None-Match: *)."""
        with self._speaking():
            try:
                obstore.put(self._store, name, data, mode="create", use_multipart=False)
            except AlreadyExistsError:
                return False
        return True

    def send(self, name: str, pieces: Iterable[bytes], size: int) -> None:
        """Put an object, in parts where it is large."""
        with self._speaking():
            if size <= PART:
                obstore.put(self._store, name, b"".join(pieces), use_multipart=False)
            else:
                part = max(PART, size // MOST_PARTS + 1)
                obstore.put(self._store, name, iter(pieces), chunk_size=part, max_concurrency=4)

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Return bytes of an object."""
        if length == 0:
            return b""
        with self._speaking(name):
            if length is None and start == 0:
                return bytes(obstore.get(self._store, name).bytes())
            size = int(obstore.head(self._store, name)["size"]) if length is None else None
            end = start + length if length is not None else size
            assert end is not None
            try:
                return bytes(obstore.get_range(self._store, name, start=start, end=end))
            except BaseError:
                size = int(obstore.head(self._store, name)["size"])
                if end <= size:
                    raise
            if start >= size:
                return b""
            return bytes(obstore.get_range(self._store, name, start=start, end=size))

    def stat(self, name: str) -> Object | None:
        """Return what is known of an object."""
        with self._speaking():
            try:
                return _object(obstore.head(self._store, name))
            except FileNotFoundError:
                return None

    def list(self, below: str) -> Iterator[Object]:
        """Yield the objects below a name, a request per thousand."""
        with self._speaking():
            for found in obstore.list(self._store, below or None, chunk_size=1000):
                yield from map(_object, found)

    def delete(self, names: Sequence[str]) -> None:
        """Delete objects, many in a request."""
        if names:
            with self._speaking():
                obstore.delete(self._store, list(names))

    @contextmanager
    def _speaking(self, name: str = "") -> Iterator[None]:
        """Say what goes wrong in one sentence; that `name` is not there stays what it is."""
        try:
            yield
        except FileNotFoundError as error:
            if _CODE.findall(str(error))[:1] != [NO_BUCKET] and name:
                raise FileNotFoundError(f"{self._address}/{name} is not there") from None
            raise self._in_words(error) from None
        except BaseError as error:
            raise self._in_words(error) from None

    def _in_words(self, error: Exception) -> ObjectsError:
        return ObjectsError(f"{self._where}: {_reason(str(error))}")


def _reason(text: str) -> str:
    """What an error of the library's comes to: its code, and what to do about it."""
    code, status = (next(iter(pattern.findall(text)), "") for pattern in (_CODE, _STATUS))
    said = f" ({code or status})" if code or status else ""
    if _NO_KEY.search(text):
        return (
            "there are no credentials in the environment: set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY"
        )
    if code == NO_BUCKET:
        return "there is no such bucket; make it, or correct --store"
    if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"):
        return f"the credentials in the environment are not accepted{said}"
    if status in ("401", "403") or code == "AccessDenied":
        return f"no permission{said}; the store needs to list, read, write and delete there"
    if status == "301" or "redirect" in text:
        return "the bucket is in another region; set AWS_REGION"
    if said:
        return f"the request failed{said}"
    if "sending request" in text or "connect" in text or "timed out" in text:
        return "it cannot be reached; check the network and AWS_ENDPOINT_URL"
    return "the request failed, and the library does not say why"


def _object(found: "obstore.ObjectMeta") -> Object:
    version = found["e_tag"] or str(found["last_modified"])
    return Object(found["path"], found["size"], found["last_modified"], version)
