"""Nothing leaves the machine: all commands, with every look-up and connection counted.

They run in one process and its children, each with an audit hook; where user namespaces are
allowed also in one that has loopback alone.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.patience import PATIENCE
from tests.pipeline import pico

ROOT = Path(__file__).resolve().parents[2]
HOOK = """
import os, sys

def hook(event, args):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        place = args[0]
    elif event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        if not isinstance(args[1], tuple):
            return  # a socket of this machine's own kind
        place = args[1][0]
    else:
        return
    if isinstance(place, bytes):
        place = place.decode()
    here = (None, "", "localhost", "127.0.0.1", "::1", "0.0.0.0")
    word = "inside" if place in here else "outside"
    line = f"{word} {event} {place} {os.getpid()}\\n".encode()
    file = os.open(os.environ["WATCHED"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, line)
    os.close(file)

sys.addaudithook(hook)
if "WATCHED_NAMESPACE" in os.environ:
    import fcntl, socket, struct
    with socket.socket() as one:  # loopback has to be brought up in a new namespace
        fcntl.ioctl(one, 0x8914, struct.pack("16sH14x", b"lo", 0x41))
"""
TASK = """
task: own
dataset_path: json
dataset_kwargs: {data_files: {test: data/own.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
SCRIPT = """
import json, sys
from pathlib import Path
from flows.commands.cli import main

def command(*words):
    sys.argv[1:] = words
    try:
        main()
    except SystemExit as end:
        assert not end.code, (words, end.code)

settings = json.loads(sys.argv[1])
home = settings["home"]
method, flags = settings.pop("method"), []
for name, value in settings.items():
    text = ",".join(value) if isinstance(value, list) else str(value)
    flags += ["--" + name.replace("_", "-"), text]
command("methods")
command("plan", *flags, "--method", method)
command("run", *flags, "--method", method, "--output", home + "-out")
command("sweep", *flags, "--methods", method, "--report", home + "-report")
command("export", home + "-out", "--output", home + "-dense")
for word in ("ls", "verify", "gc"):
    command("store", word, "--home", home)
key = next(Path(home, "store", "evaluate").glob("*/*")).name
command("store", "show", key, "--home", home)
command("store", "why", key, "--home", home)

from flows.runs.execute import run_flow
from flows.server import runtime
from flows.settings.config import RunConfig

with runtime.flow_settings():
    run_flow(RunConfig(**settings, method=method))
"""


def in_a_namespace() -> list[str]:
    """The words before a command that give it a network of loopback alone, if that is allowed."""
    words = ["unshare", "-rn"]
    try:
        allowed = subprocess.run([*words, "true"], capture_output=True).returncode == 0
    except OSError:
        allowed = False
    return words if allowed else []


def local_task(folder: Path) -> dict[str, Any]:
    """Settings that have an lm-eval task of local files, for which nobody needs the network."""
    (folder / "data").mkdir(parents=True)
    line = json.dumps({"question": "one two", "answer": 0, "choices": ["a", "b"]}) + "\n"
    (folder / "data" / "own.jsonl").write_text(line * 2)
    (folder / "own.yaml").write_text(TASK)
    return {"tasks": ["own"], "task_path": folder}


@pytest.fixture(scope="module")
def looks(inputs: pico.Inputs, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A line for each look-up and connection of all commands, with what it was about."""
    folder = tmp_path_factory.mktemp("quiet")
    (folder / "hook").mkdir()
    (folder / "hook" / "sitecustomize.py").write_text(HOOK)
    watched = folder / "looks.txt"
    task = local_task(folder / "tasks")
    settings: dict[str, Any] = inputs.settings(folder / "home", method="svd", **task)
    before = in_a_namespace()
    more = {"WATCHED_NAMESPACE": "1"} if before else {}
    done = subprocess.run(
        [*before, sys.executable, "-c", SCRIPT, json.dumps(settings, default=str)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=pico.clean_environment(
            PYTHONPATH=os.pathsep.join([str(folder / "hook"), str(ROOT)]),
            WATCHED=str(watched),
            HF_HOME=str(folder / "hf"),
            **more,
        ),
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return watched.read_text().splitlines()


def test_no_command_looks_anything_up_or_connects_to_anything_outside(looks: list[str]) -> None:
    assert [line for line in looks if line.startswith("outside")] == []


def test_what_is_inside_is_seen(looks: list[str]) -> None:
    """Commands and their private server speak over loopback: a hook that sees nothing is broken."""
    assert any(line.startswith("inside socket.connect 127.0.0.1") for line in looks)
