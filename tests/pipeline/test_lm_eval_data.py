"""What a task reads: its key changes with every local file, or its score is not kept."""

import importlib
import json
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from compress_core.errors import ConfigError
from compress_core.hf.lm_eval_find import find_tasks
from compress_core.hf.lm_eval_watch import Watch
from tests.pipeline import pico

TASK = """
task: mine
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
BY_FILE = "dataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}\n"
PLAIN = 'doc_to_target: "{{answer}}"\n'
CODE = "doc_to_target: !function mine.target\n"
HEAD = "import json\nfrom pathlib import Path\nHERE = Path(__file__).parent\n"
FIRST = "def target(doc):\n    return doc['answer']\n"
SECOND = "def target(doc):\n    return 1 - doc['answer']\n"


def rows(answer: int) -> str:
    records = [{"question": f"a{i}", "choices": ["da", "te"], "answer": answer} for i in range(6)]
    return "\n".join(json.dumps(record) for record in records)


def files_of(data: str = BY_FILE, target: str = PLAIN, **files: str) -> dict[str, str]:
    named = {name.replace("__", "/"): text for name, text in files.items()}
    return {"mine.yaml": TASK + data + target, **named}


FOLDER = {"data/test.jsonl": rows(0)}
NEW = ("data/test.jsonl", rows(1))
ROWS = {"rows.jsonl": rows(0)}
KINDS: dict[str, tuple[dict[str, str], str, str]] = {
    "a data file": ({**files_of(), **ROWS}, "rows.jsonl", rows(1)),
    "a relative folder": (
        {**files_of("dataset_path: data\n"), **FOLDER},
        *NEW,
    ),
    "a folder by ./": (
        {**files_of("dataset_path: ./data\n"), **FOLDER},
        *NEW,
    ),
    "an absolute folder": (
        {**files_of("dataset_path: FOLDER/data\n"), **FOLDER},
        *NEW,
    ),
    "data_dir": (
        {**files_of("dataset_path: json\ndataset_kwargs: {data_dir: data}\n"), **FOLDER},
        *NEW,
    ),
    "files inside a folder": (
        {
            **files_of("dataset_path: data\ndataset_kwargs: {data_files: {test: 'te*.jsonl'}}\n"),
            **FOLDER,
        },
        *NEW,
    ),
    "a list of patterns": (
        {
            **files_of(
                "dataset_path: json\ndataset_kwargs: {data_files: {test: ['data/*.jsonl']}}\n"
            ),
            **FOLDER,
        },
        *NEW,
    ),
    "an include": (
        {**files_of("include: base\n"), "base": BY_FILE, **ROWS},
        "base",
        BY_FILE + "target_delimiter: x\n",
    ),
    "a function": ({**files_of(target=CODE), "mine.py": FIRST, **ROWS}, "mine.py", SECOND),
    "a module beside": (
        {
            **files_of(target=CODE),
            "mine.py": "import sys\nsys.path.insert(0, __file__[:-8])\n"
            "import beside_mine\ntarget = beside_mine.target\n",
            "beside_mine.py": FIRST,
            **ROWS,
        },
        "beside_mine.py",
        SECOND,
    ),
    "a file opened beside": (
        {
            **files_of(target=CODE),
            "mine.py": HEAD + "def target(doc):\n"
            "    return json.loads((HERE / 'refs' / 'one.json').read_text())\n",
            "refs/one.json": "0",
            **ROWS,
        },
        "refs/one.json",
        "1",
    ),
    "a file whose name is put together": (
        {
            **files_of(target=CODE),
            "mine.py": HEAD + "N = json.loads((HERE / f'r{1}.json').read_text())\n"
            "def target(doc):\n    return N\n",
            "r1.json": "0",
            **ROWS,
        },
        "r1.json",
        "1",
    ),
    "examples of a function": (
        {
            **files_of(target=PLAIN + "fewshot_config: {samples: !function mine.shots}\n"),
            "mine.py": HEAD + "def shots():\n"
            "    return [json.loads(line) for line in open(HERE / 'shots.jsonl')]\n",
            "shots.jsonl": rows(0),
            **ROWS,
        },
        "shots.jsonl",
        rows(1),
    ),
    "a dataset made by code": (
        {
            **files_of("custom_dataset: !function mine.data\nmetadata: {file: rows.jsonl}\n"),
            "mine.py": "def data(file):\n    return file\n",
            **ROWS,
        },
        "rows.jsonl",
        rows(1),
    ),
}


@pytest.fixture(autouse=True)
def _fresh_modules() -> Iterator[None]:
    before, path = set(sys.modules), list(sys.path)
    yield
    for name in set(sys.modules) - before:
        if name == "beside_mine" or name.endswith("/mine"):
            del sys.modules[name]
    sys.path[:] = path
    importlib.invalidate_caches()


def make(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text.replace("FOLDER", str(folder)))
    return folder


def replace(file: Path, text: str) -> None:
    """Another content of the same size or not, with the same mtime."""
    stat = file.stat()
    file.write_text(text)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def key_of(folder: Path) -> str:
    (spec,) = find_tasks(["mine"], folder)
    return json.dumps(spec.digest_parts, sort_keys=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_is_another_when_a_file_that_it_reads_changes(kind: str, tmp_path: Path) -> None:
    files, changed, text = KINDS[kind]
    folder = make(tmp_path / "tasks", files)
    before = key_of(folder)
    assert key_of(folder) == before
    make(tmp_path / "beside", {"stranger.json": "0"})
    assert key_of(folder) == before
    replace(folder / changed, text)
    assert key_of(folder) != before


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("dataset_path: ./none\n", r"none does not exist; check dataset_path"),
        ("dataset_path: /none/at/all\n", r"/none/at/all does not exist; check dataset_path"),
        (
            "dataset_path: json\ndataset_kwargs: {data_dir: none}\n",
            "none does not exist; .* data_dir",
        ),
        (BY_FILE, r"rows\.jsonl does not exist; check data_files"),
    ],
)
def test_data_that_is_not_there_is_refused_by_its_name(
    data: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        find_tasks(["mine"], make(tmp_path, files_of(data)))


def settings(inputs: pico.Inputs, home: Path, folder: Path, **more: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"method": "svd", "calibration": None, "eval_text": [], "kept": 0.9}
    return inputs.settings(home, tasks=["mine"], task_path=folder, **(given | more))


def dense_score(walk: pico.Walk) -> tuple[str, float]:
    (outcome,) = (o for o in walk.outcomes if o.unit == "dense on task mine")
    (unit,) = (u for u in walk.session.manifests if u.name == "dense on task mine")
    return outcome.state, dict(walk.session.artifact(unit).attrs)["acc"]


def test_new_data_of_the_same_time_and_place_give_their_own_score(
    inputs: pico.Inputs, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *words, **_: asked.append(words))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "users")
    folder = make(tmp_path / "tasks", KINDS["a relative folder"][0])
    assert dense_score(pico.walk(settings(inputs, home, folder)))[0] == "computed"
    state, score = dense_score(pico.walk(settings(inputs, home, folder)))
    assert state == "cached"
    replace(folder / "data" / "test.jsonl", rows(1))
    assert dense_score(pico.walk(settings(inputs, home, folder))) == ("computed", 1 - score)
    # All of it without a look-up, and without a copy in the user's cache.
    assert not asked
    assert not (tmp_path / "users").exists()


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="of machines with a /dev/shm")
def test_files_in_shared_memory_are_their_users_and_devices_are_not() -> None:
    watched = Watch()
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        watched.opened |= {file.name, "/dev/null", "/proc/self/status", "/etc/passwd"}
        assert watched.files() == {Path(file.name)}


def test_a_score_is_not_kept_where_nobody_knows_what_it_was_made_of(
    inputs: pico.Inputs, home: Path, tmp_path: Path
) -> None:
    code = "def target(doc):\n    return json.loads((HERE / f'r{1}.json').read_text())\n"
    folder = make(
        tmp_path / "tasks",
        {**files_of(target=CODE), "mine.py": HEAD + code, "r1.json": "0", **ROWS},
    )
    first = pico.walk(settings(inputs, home, folder))
    state, score = dense_score(first)
    assert state == "computed"
    note = f"scores of task mine are computed each time, not cached: its code also read {folder}"
    assert any(problem.startswith(note) for problem in first.problems)
    replace(folder / "r1.json", "1")
    assert dense_score(pico.walk(settings(inputs, home, folder))) == ("computed", 1 - score)
