"""A server that speaks S3, on loopback and in this process, with a bucket of its own per test."""

import logging
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import obstore
from obstore.store import S3Store

BUCKET = "models"


@dataclass(frozen=True)
class Server:
    """Where it is, and what the environment of who speaks to it has."""

    url: str

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": "AKIDOFTHETESTS",
            "AWS_SECRET_ACCESS_KEY": "a-secret-of-the-tests",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.url,
        }

    def address(self) -> str:
        """A prefix in the bucket that nobody has used."""
        return f"s3://{BUCKET}/{secrets.token_hex(6)}"

    def raw(self) -> S3Store:
        """The bucket as the library has it, to do harm."""
        return S3Store(
            BUCKET,
            endpoint=self.url,
            access_key_id="x",
            secret_access_key="x",
            region="us-east-1",
            client_options={"allow_http": True},
        )

    def names(self, address: str) -> list[str]:
        """What lies below an address."""
        prefix = address.removeprefix(f"s3://{BUCKET}/")
        found = obstore.list(self.raw(), prefix).collect()
        return sorted(entry["path"].removeprefix(f"{prefix}/") for entry in found)

    def corrupt(self, address: str, name: str) -> None:
        """Flips one bit in the middle of an object."""
        path = f"{address.removeprefix(f's3://{BUCKET}/')}/{name}"
        data = bytearray(bytes(obstore.get(self.raw(), path).bytes()))
        data[len(data) // 2] ^= 1
        obstore.put(self.raw(), path, bytes(data))


def one_at_a_time(app: Any) -> Any:
    """A server's app that ends a request before it begins the next.

    S3 creates an object for one of many who ask at once; this server looks and puts in two steps.
    """
    turn = threading.Lock()

    def answer(environ: Any, start_response: Any) -> Any:
        with turn:
            return app(environ, start_response)

    return answer


@contextmanager
def serving() -> Iterator[Server]:
    """Starts the server and ends it."""
    import urllib.request

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server: Any = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    server._server.app = one_at_a_time(server._server.app)
    try:
        host, port = server.get_host_and_port()
        found = Server(f"http://{host}:{port}")
        make = urllib.request.Request(f"{found.url}/{BUCKET}", method="PUT")
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(make).close()
        yield found
    finally:
        server.stop()
