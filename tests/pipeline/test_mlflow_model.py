"""A registered version is a model of MLflow's own, served where nothing of ours is installed."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from compress_core.hf.companions import companion_files
from compress_core.hf.writing import write_on
from tasks.tracking.files import NOT_OF_MODEL, folder_digests
from tasks.tracking.package import CODE_FILE, PACKAGE_FILES, requirements, write_package
from tasks.tracking.speaking import speaking
from tasks.tracking.versions import check_files, find_version
from tests.patience import is_answered, wait_for
from tests.pipeline import pico

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
)
CHAT = {"messages": [{"role": "user", "content": "ae"}], "max_tokens": 5}
COMPLETION = {"prompt": "Ae ae", "max_tokens": 6}

SERVE = ("-m", "models:/pico@champion", "--env-manager", "local", "--workers", "1")

PREDICT = """
import importlib.util, json, sys
import mlflow, pandas
from mlflow.exceptions import MlflowException
assert importlib.util.find_spec("compress_core") is None
model = mlflow.pyfunc.load_model(sys.argv[1])
def ask(request):
    try:
        return model.predict(request)
    except MlflowException as error:
        return {"status": error.get_http_status_code(), "error": error.message}
asked = json.load(sys.stdin)
print(json.dumps([ask(one) for one in asked["one by one"]]))
print(json.dumps(model.predict(pandas.DataFrame(asked["as a table"]))))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of processes that have all libraries and nothing of ours."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder / "python", with_pip=False, symlinks=True)
    (packages,) = (folder / "python").glob("lib/python*/site-packages")
    # Of the folder that is named here no .pth is read, and so not that of an editable install.
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    programs = folder / "python" / "bin"
    server = programs / "uvicorn"  # MLflow calls it by its name
    server.write_text(f"#!{programs / 'python'}\nfrom uvicorn.main import main\nmain()\n")
    server.chmod(0o755)
    values = pico.clean_environment(
        HF_MODULES_CACHE=str(folder / "modules"),
        HF_HUB_OFFLINE="1",
        MLFLOW_DISABLE_TELEMETRY="true",
        PATH=f"{programs}{os.pathsep}{os.environ['PATH']}",
    )
    values.pop("PYTHONPATH", None)
    return values


@pytest.fixture(scope="module")
def home(cold: dict[str, Any], blank_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry whose "pico@champion" is the run's folder, copied, with a chat template."""
    home = tmp_path_factory.mktemp("registry") / "home"
    home.mkdir()
    shutil.copyfile(blank_home / "mlflow.db", home / "mlflow.db")
    folder = home / "moved"
    shutil.copytree(cold["model_dir"], folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    pico.register(home, "pico", [folder])
    with pico.environment(pico.clean_environment()), speaking(home, "to prepare") as client:
        client.set_registered_model_alias("pico", "champion", "1")
    return home


def ask_pyfunc(environment: dict[str, str], home: Path, requests: dict[str, Any]) -> list[Any]:
    """What `mlflow.pyfunc` answers in a process of its own."""
    values = environment | {"MLFLOW_TRACKING_URI": f"sqlite:///{home / 'mlflow.db'}"}
    done = subprocess.run(
        ["python", "-P", "-c", PREDICT, "models:/pico@champion"],
        input=json.dumps(requests),
        env=values,
        cwd=home,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "ignored" not in done.stderr and "quantization" not in done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_run_registers_a_model_of_mlflow(cold: dict[str, Any], cold_home: Path) -> None:
    folder = Path(cold["model_dir"])
    model = Model.load(str(folder))
    flavour = model.flavors["python_function"]
    assert flavour["artifacts"] == {"model": {"path": ".", "uri": "."}}
    assert flavour["model_code_path"] == CODE_FILE
    assert str(folder.parent) not in (folder / "MLmodel").read_text()
    assert model.signature is not None and model.signature.inputs.input_names()[0] == "prompt"
    assert (folder / "requirements.txt").read_text().split() == requirements()
    assert all("==" in line and "+" not in line for line in requirements())
    assert "import compress_core" not in (folder / CODE_FILE).read_text()
    with pico.environment(pico.clean_environment()):
        name, number = cold["registered"]["name"], cold["registered"]["version"]
        assert check_files(folder, find_version(cold_home, f"{name}/{number}"))


def test_the_same_folder_is_packaged_to_the_same_bytes(
    cold: dict[str, Any], tmp_path: Path
) -> None:
    folder = Path(cold["model_dir"])
    write_package(tmp_path, folder.name)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(PACKAGE_FILES)
    before = folder_digests(folder)
    assert folder_digests(tmp_path) == {name: before[name] for name in PACKAGE_FILES}
    assert not {file.name for file in companion_files(folder)} & {*PACKAGE_FILES}  # of an export


def test_pyfunc_answers_where_nothing_of_ours_is_installed(
    environment: dict[str, str], home: Path
) -> None:
    wrong = [
        ({}, "either a prompt or messages"),
        ({**COMPLETION, **CHAT}, "either a prompt or messages"),
        ({"prompt": ""}, "prompt is a text that is not empty"),
        ({"prompt": ["a", 3]}, "or a list of such texts"),
        ({"prompt": []}, "prompt is an empty list"),
        ({"messages": []}, "messages is a list of one message or more"),
        ({"messages": [{"role": "user"}]}, "the content of each of messages is text"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "refuses these messages: no tools"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens is a whole number, 1 or more, got 0"),
        ({"prompt": "a", "max_tokens": 99}, "context of 64 has room for"),
        ({"prompt": "ae " * 90}, "the prompt has"),
        ({"prompt": "a", "max_tokens": 3, "max_new_tokens": 3}, "say the same"),
        ({"prompt": "a", "temperature": -1}, "temperature is a number, from 0 to 100, got -1"),
        ({"prompt": "a", "temperature": 1e-9}, "temperature is 0, or 0.01 and more, got 1e-09"),
        ({"prompt": "a", "temperature": "hot"}, "temperature is a number"),
        ({"prompt": "a", "top_p": 0}, "top_p is above 0"),
        ({"prompt": "a", "stop": ""}, "stop is a text that is not empty"),
        ({"prompt": "a", "stream": True}, "no stream"),
        ({"prompt": "a", "n": 2}, "one answer at a time"),
    ]
    drawn = {**COMPLETION, "temperature": 1.5, "top_p": 0.9, "max_new_tokens": 12}
    del drawn["max_tokens"]
    right = [
        COMPLETION,
        CHAT,
        {**COMPLETION, "prompt": ["Ae ae", "oi"]},
        {**drawn, "seed": 1},
        {**drawn, "seed": 1},
        {**drawn, "seed": 2},
    ]
    asked = {"one by one": right + [one for one, _ in wrong], "as a table": [COMPLETION, drawn]}
    answers, table = ask_pyfunc(environment, home, asked)
    completion, chat, two, first, again, other, *refused = answers

    (choice,) = completion["choices"]
    assert completion["object"] == "text_completion" and completion["model"].startswith("pico-")
    usage = completion["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens"] == 6 or choice["finish_reason"] == "stop"
    assert choice["text"] and not choice["text"].startswith("Ae ae")
    assert chat["object"] == "chat.completion"
    assert chat["choices"][0]["message"]["role"] == "assistant"
    assert [one["index"] for one in two["choices"]] == [0, 1]
    assert two["choices"][0]["text"] == choice["text"]  # greedy: alone or beside another prompt
    assert first["choices"] == again["choices"] != other["choices"]
    assert table[0]["choices"] == completion["choices"] and len(table) == 2
    for (request, said), answer in zip(wrong, refused, strict=True):
        assert answer.get("status") == 400 and said in answer["error"], (request, answer)


@pytest.fixture
def server(environment: dict[str, str], home: Path, tmp_path: Path) -> Iterator[str]:
    """The address of `mlflow models serve`, for as long as a test takes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = f"from mlflow.cli import cli; cli(['models', 'serve', *{SERVE!r}, '-p', '{port}'])"
    with (
        open(tmp_path / "log", "w") as log,
        subprocess.Popen(
            ["python", "-P", "-c", serve],
            env=environment | {"MLFLOW_TRACKING_URI": f"sqlite:///{home / 'mlflow.db'}"},
            cwd=tmp_path,
            stdout=log,
            stderr=log,
            start_new_session=True,
        ) as process,
    ):
        try:
            address = f"http://127.0.0.1:{port}"
            _wait(address, process, tmp_path / "log")
            yield address
        finally:
            os.killpg(process.pid, signal.SIGTERM)


def _wait(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    wait_for(lambda: process.poll() is not None or is_answered(f"{address}/ping"), every=0.5)
    assert process.poll() is None, log.read_text()


def _post(address: str, request: dict[str, Any]) -> tuple[int, Any]:
    body = json.dumps(request).encode()
    asked = urllib.request.Request(
        f"{address}/invocations", body, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(asked) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_mlflow_serves_it_over_http(server: str) -> None:
    status, completion = _post(server, COMPLETION)
    assert (status, completion["object"]) == (200, "text_completion")
    status, chat = _post(server, CHAT)
    assert status == 200 and isinstance(chat["choices"][0]["message"]["content"], str)
    status, refused = _post(server, {"prompt": ""})
    assert status == 400 and "prompt is a text that is not empty" in refused["message"]
    status, listed = _post(server, {"dataframe_records": [COMPLETION]})
    assert listed["predictions"]["choices"] == completion["choices"]


def test_answers_end_where_they_are_told_to_in_any_thread(
    home: Path, code_cache: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home / 'mlflow.db'}")
    model = mlflow.pyfunc.load_model(str(home / "moved"))  # here ours is imported: no matter
    whole = model.predict({"prompt": "Ae ae", "max_tokens": 12})["choices"][0]
    assert whole["text"].split() == write_on(home / "moved", "Ae ae", 12).split()
    stop = whole["text"][4:7]
    request = {"prompt": "Ae ae", "max_tokens": 12, "stop": ["never there", stop]}
    with ThreadPoolExecutor(4) as threads:
        answers = [one["choices"][0] for one in threads.map(model.predict, [request] * 4)]
    said = model.predict({"prompt": "Ae ae"}, params={"max_tokens": 12})["choices"][0]
    assert said == whole
    model.unwrap_python_model().tokenizer.chat_template = None
    with pytest.raises(MlflowException, match="this model has no chat template: send a prompt"):
        model.predict(CHAT)
    cut = whole["text"][: whole["text"].index(stop)]
    assert {(one["text"], one["finish_reason"]) for one in answers} == {(cut, "stop")}
    folder = home / "moved"
    left = {file.name for file in folder.iterdir()} & {*NOT_OF_MODEL}
    assert "registered_model_meta" in left  # by the server of the test before
    assert check_files(folder, find_version(home, "pico@champion"))
