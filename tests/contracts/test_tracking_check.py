"""Before any work: MLflow is asked, as it would be at the end, whether it will take the run."""

import http.server
import json
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.tracking import client as tracking
from tasks.tracking.check import CHECKED, check_tracking
from tasks.tracking.speaking import IMPATIENT, TrackingError, speaking
from tests.pipeline import pico

Answer = tuple[int, Any]
Serve = Callable[..., str]
SECRET = "sesame-opens"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with pico.environment(pico.clean_environment()):
        yield


@pytest.fixture
def home(blank_home: Path, tmp_path: Path) -> Path:
    target = tmp_path / "home"
    target.mkdir()
    shutil.copyfile(blank_home / "mlflow.db", target / "mlflow.db")
    return target


def refusal(home: Path, uri: str | None = None, models: tuple[str, ...] = ("m",)) -> str:
    """The one line of a check that fails."""
    with pytest.MonkeyPatch.context() as patch:
        if uri is not None:
            patch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(TrackingError) as caught:
            check_tracking(home, models)
    line = str(caught.value)
    assert "\n" not in line
    assert SECRET not in line
    return line


EXPERIMENT = {"experiment_id": "7", "name": "eigenpress", "lifecycle_stage": "active"}
DENIED: Answer = (403, {"error_code": "PERMISSION_DENIED", "message": "Permission denied"})
INVALID: Answer = (400, {"error_code": "INVALID_PARAMETER_VALUE", "message": "two names"})
EXISTS: Answer = (400, {"error_code": "RESOURCE_ALREADY_EXISTS", "message": "there"})


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Starts a tracking server of fixed answers, all of them well meaning but those given."""
    servers: list[http.server.HTTPServer] = []

    def start(answers: dict[str, Answer], asked: list[tuple[str, str, str | None]]) -> str:
        experiment = EXPERIMENT | {"artifact_location": (tmp_path / "files").as_uri()}
        known: dict[str, Answer] = {
            "experiments/get-by-name": (200, {"experiment": experiment}),
            "experiments/get": (200, {"experiment": experiment}),
            "runs/create": INVALID,
            "registered-models/create": EXISTS,
            "model-versions/create": INVALID,
        } | answers

        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                name = self.path.partition("?")[0].partition("/mlflow/")[2]
                asked.append((self.command, name, self.headers.get("Authorization")))
                status, content = known.get(name, (404, "no such page"))
                body = content if isinstance(content, str) else json.dumps(content)
                self.send_response(status)
                self.send_header("Retry-After", "3600")
                self.end_headers()
                self.wfile.write(body.encode())

            do_GET = do_POST = do_DELETE = answer

            def log_message(self, *_: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("where", ["address", "variables", "token"])
def test_the_credentials_are_those_that_mlflow_uses(
    where: str, serve: Serve, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str, str | None]] = []
    uri = serve({}, asked)
    if where == "address":
        uri = uri.replace("://", f"://user:{SECRET}@")
    elif where == "variables":
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "user")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    else:
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)

    check_tracking(home, ["m"])

    kind = "Bearer" if where == "token" else "Basic"
    assert {str(header).partition(" ")[0] for _, _, header in asked} == {kind}
    assert ("POST", "runs/create") in {(method, name) for method, name, _ in asked}


@pytest.mark.parametrize(
    ("name", "answer", "words"),
    [
        ("experiments/get-by-name", (401, "who are you?"), "refused to show or make the exper"),
        ("experiments/get-by-name", (200, "<html>please log in</html>"), "refused to show or make"),
        ("experiments/get-by-name", (500, "broken"), "refused to show or make the experiment"),
        ("experiments/get-by-name", (503, "later"), "refused to show or make the experiment"),
        ("runs/create", DENIED, "refused to make a run in the experiment 'eigenpress': PERM"),
        ("runs/create", (405, "read only"), "refused to make a run in the experiment"),
        ("registered-models/create", DENIED, "refused to register a version of 'm': PERMISSION"),
        ("model-versions/create", DENIED, "refused to register a version of 'm': PERMISSION"),
    ],
)
def test_what_a_server_would_refuse_at_the_end_is_refused_at_once(
    name: str, answer: Answer, words: str, serve: Serve, home: Path
) -> None:
    uri = serve({name: answer}, [])
    line = refusal(home, uri.replace("://", f"://user:{SECRET}@"))
    assert words in line
    assert uri.replace("://", "://***@") in line


def test_an_experiment_that_may_not_be_seen_is_not_called_deleted(serve: Serve, home: Path) -> None:
    hidden: Answer = (404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "none"})
    uri = serve({"experiments/get-by-name": hidden, "experiments/create": EXISTS}, [])
    assert "exists, but this user may not see it" in refusal(home, uri)


def test_files_that_cannot_be_kept_are_refused(serve: Serve, home: Path, tmp_path: Path) -> None:
    (tmp_path / "files").write_text("a file where a folder belongs")
    line = refusal(home, serve({}, []))
    assert f"refused to keep files at {(tmp_path / 'files').as_uri()}" in line


@pytest.mark.parametrize(
    "uri",
    [
        f"foo://user:{SECRET}@host/x",
        f"http://user:{SECRET}@127.0.0.1:port/",
        f"http://user:{SECRET}@/",
        f"postgresql://user:{SECRET}@127.0.0.1:9/x",
        f"mysql+nodriver://user:{SECRET}@127.0.0.1:9/x",
        f"sqlite:////dev/null/x.db?password={SECRET}",
        f"https://user:{SECRET}@127.0.0.1:9/?token={SECRET}",
        "uc:",
    ],
)
def test_an_address_that_will_not_do_is_one_line_without_its_password(uri: str, home: Path) -> None:
    line = refusal(home, uri)
    assert line.startswith(("MLflow at ", "no MLflow server answers at "))


def test_a_server_that_is_not_there_says_so(home: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{closed.getsockname()[1]}"
        line = refusal(home, uri.replace("://", f"://user:{SECRET}@"))
    assert line.startswith(f"no MLflow server answers at {uri.replace('://', '://***@')} (")
    assert "Connection refused" in line


def test_a_server_that_takes_connections_and_says_nothing_is_given_up(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(IMPATIENT, "MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        line = refusal(home, f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert line.startswith("no MLflow server answers at ")


def test_a_deleted_experiment_is_refused_with_the_way_back(home: Path) -> None:
    check_tracking(home)
    with speaking(home, "to look") as client:
        found = client.get_experiment_by_name("eigenpress")
        assert found is not None
        client.delete_experiment(found.experiment_id)
    line = refusal(home)
    assert f"mlflow experiments restore --experiment-id {found.experiment_id}" in line


@pytest.mark.parametrize("name", ["a/b", "a:b", " "])
def test_a_name_that_no_model_may_have_is_refused(name: str, home: Path) -> None:
    assert f"refused to register a version of {name!r}" in refusal(home, models=(name,))


def test_a_database_that_cannot_be_written_is_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_tracking(home)
    monkeypatch.chdir(home)  # MLflow makes folders of such an address, below where it stands
    line = refusal(home, f"sqlite:///file:{home}/mlflow.db?mode=ro&uri=true")
    assert "refused to make a run" in line and "readonly" in line


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"this is no database" * 100)
    assert "mlflow.db" in refusal(tmp_path)


def test_the_check_leaves_what_the_end_makes_and_nothing_else(home: Path) -> None:
    for _ in range(2):
        check_tracking(home, ["m"])
    with speaking(home, "to look") as client:
        found = client.get_experiment_by_name("eigenpress")
        assert found is not None and CHECKED in found.tags
        from mlflow.entities import ViewType

        assert not list(client.search_runs([found.experiment_id], run_view_type=ViewType.ALL))
        assert [model.name for model in client.search_registered_models()] == ["m"]
    assert tracking.registered_versions(home) == []
    assert not [path for path in (home / "mlartifacts").rglob("*") if path.is_file()]
