"""A stand-in for the hub's HTTP interface on loopback: what an upload needs, and what came."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "a" * 30


class Hub(ThreadingHTTPServer):
    """Repositories in memory, for one token.

    Attributes:
        files: Repository to path to content.
        private: Repositories that are.
        unknown: Requests that it has no answer to.
        refusals: What it answered 401 to.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.objects: dict[str, bytes] = {}
        self.unknown: list[str] = []
        self.refusals: list[str] = []

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that ends with the block."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Says nothing."""

    def _answer(self, value: Any, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _read(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _known(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.server.refusals.append(self.path)
        self._answer({"error": "Invalid credentials in Authorization header"}, 401)
        return False

    def do_GET(self) -> None:
        """The files that a repository has."""
        path = self.path.partition("?")[0]
        repository = "/".join(path.split("/")[3:5])
        if not self._known():
            return
        if path == f"/api/models/{repository}/tree/main":
            files = self.server.files[repository].items()
            self._answer(
                [{"type": "file", "path": p, "size": len(c), "oid": "0" * 40} for p, c in files]
            )
        else:
            self._miss()

    def do_PUT(self) -> None:
        """One large file."""
        self.server.objects[self.path.rpartition("/")[2]] = self._read()
        self._answer({})

    def do_POST(self) -> None:
        """Everything else."""
        path, body = self.path.partition("?")[0], self._read()
        if not self._known():
            return
        parts = path.split("/")
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.server.files.setdefault(name, {})
            if asked.get("private") or asked.get("visibility") == "private":
                self.server.private.add(name)
            self._answer({"url": f"{self.server.url}/{name}", "id": name})
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "preupload" in parts:
            self._answer({"files": [_mode(file) for file in json.loads(body)["files"]]})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            self._answer({"transfer": "basic", "objects": [self._place(o) for o in objects]})
        elif "commit" in parts:
            self._commit("/".join(parts[3:5]), body)
        else:
            self._miss()

    def _place(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {**asked, "actions": {"upload": {"href": f"{self.server.url}/put/{asked['oid']}"}}}

    def _commit(self, repository: str, body: bytes) -> None:
        files = self.server.files[repository]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        url = f"{self.server.url}/{repository}/commit/{'1' * 40}"
        self._answer({"success": True, "commitOid": "1" * 40, "commitUrl": url})

    def _miss(self) -> None:
        self.server.unknown.append(f"{self.command} {self.path}")
        self._answer({"error": "not here"}, 404)


def _mode(file: dict[str, Any]) -> dict[str, Any]:
    large = file["path"].endswith(".safetensors")
    return {
        "path": file["path"],
        "uploadMode": "lfs" if large else "regular",
        "shouldIgnore": False,
    }
