"""A bucket that cannot be used is one clear line before any work, and no secret is in it."""

import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from compress_core.errors import ConfigError
from flows.settings.config import RunConfig, build_config
from tests.pipeline import pico
from tests.s3_server import Server

Refuse = Callable[..., str]
KEYS = {
    "AWS_ACCESS_KEY_ID": "AKIDOFTHETESTS",
    "AWS_SECRET_ACCESS_KEY": "a-secret-of-the-tests",
    "AWS_REGION": "us-east-1",
}


@contextmanager
def answering(status: int, code: str) -> Iterator[str]:
    """A server that says the same to everything, and repeats the key as S3 does."""
    said = f"<Error><Code>{code}</Code><AWSAccessKeyId>AKIDOFTHETESTS</AWSAccessKeyId></Error>"

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(said.encode())

        do_GET = do_PUT = do_HEAD = do_POST = answer

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def closed() -> str:
    """An address at which nobody listens."""
    with answering(200, "") as address:
        return address


@pytest.mark.parametrize(
    ("status", "code", "line"),
    [
        (403, "AccessDenied", r"no permission \(AccessDenied\); the store needs to list"),
        (403, "InvalidAccessKeyId", r"credentials in the environment are not accepted \(Inv"),
        (403, "SignatureDoesNotMatch", "credentials in the environment are not accepted"),
        (404, "NoSuchBucket", "there is no such bucket; make it, or correct --store"),
        (301, "PermanentRedirect", "another region; set AWS_REGION"),
        (501, "NotImplemented", r"the request failed \(NotImplemented\)"),
    ],
)
def test_what_the_bucket_says_is_passed_on_in_words(
    status: int, code: str, line: str, refuse: Refuse, tmp_path: Path
) -> None:
    words = ("store", "ls", "--home", tmp_path, "--store", "s3://bucket/a")
    with answering(status, code) as endpoint:
        said = refuse(*words, AWS_ENDPOINT_URL=endpoint, **KEYS)
    assert said.startswith("s3://bucket/a at 127.0.0.1:")
    assert_in_words(said, line)


def assert_in_words(said: str, line: str) -> None:
    assert re.search(line, said), said
    assert "AKID" not in said and "a-secret" not in said


def test_an_endpoint_that_is_down(refuse: Refuse, tmp_path: Path) -> None:
    said = refuse(
        *("store", "ls", "--home", tmp_path, "--store", "s3://bucket/a"),
        AWS_ENDPOINT_URL=closed(),
        **KEYS,
    )
    assert_in_words(said, "it cannot be reached; check the network and AWS_ENDPOINT_URL")


def test_credentials_that_are_not_there(refuse: Refuse, tmp_path: Path) -> None:
    words = ("store", "ls", "--home", tmp_path, "--store", "s3://bucket/a")
    said = refuse(*words, AWS_METADATA_ENDPOINT=closed())
    assert_in_words(said, "there are no credentials in the environment: set AWS_ACCESS_KEY_ID and")
    said = refuse(*words, AWS_ACCESS_KEY_ID="AKIDOFTHETESTS")
    assert_in_words(said, "AWS_SECRET_ACCESS_KEY is not set")


def test_the_library_that_is_not_installed(
    refuse: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "storage.s3", raising=False)
    monkeypatch.setitem(sys.modules, "obstore", None)
    said = refuse("store", "ls", "--home", tmp_path, "--store", "s3://bucket/a", **KEYS)
    assert "needs the library obstore: pip install 'eigenpress[s3]'" in said


@pytest.mark.parametrize("command", ["run", "plan", "sweep"])
def test_every_command_refuses_a_bucket_that_is_not_there_before_any_work(
    command: str, refuse: Refuse, s3: Server, inputs: pico.Inputs, tmp_path: Path
) -> None:
    settings = inputs.settings(tmp_path / "home", store="s3://nothing/here")
    if command == "sweep":
        settings["methods"] = settings.pop("method")
    words = pico.arguments(command, settings)[3:]
    said = refuse(*words, **s3.environment)
    assert "there is no such bucket" in said
    assert list((tmp_path / "home").rglob("manifest.json")) == []


def test_the_environment_names_a_store(
    monkeypatch: pytest.MonkeyPatch, refuse: Refuse, tmp_path: Path
) -> None:
    monkeypatch.setenv("EIGENPRESS_STORE", "s3://bucket/there")
    assert RunConfig(model="m", kept=0.5).store == "s3://bucket/there"
    assert RunConfig(model="m", kept=0.5, store="s3://bucket/b").store == "s3://bucket/b"
    monkeypatch.delenv("EIGENPRESS_STORE")
    assert RunConfig(model="m", kept=0.5).store is None
    said = refuse("store", "ls", "--home", tmp_path, EIGENPRESS_STORE="gs://bucket/x")
    assert "a store is s3://BUCKET/PREFIX" in said


def test_a_store_that_is_none_is_a_mistake_in_the_settings() -> None:
    with pytest.raises(ConfigError, match="store: a store is named s3://… without user") as refused:
        build_config(
            RunConfig, {"model": "m", "kept": 0.5, "store": "s3://me:hunter22@bucket/x"}, None
        )
    assert "hunter22" not in str(refused.value)
