"""Two processes that promote different versions of one model at the same moment, again and again.

`python -m tests.pipeline.racing 100` races a hundred times in each of three settings: on one data
directory, on two that share a database, and (with `--server`) through a tracking server.
"""

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VERSIONS = 3
NAME = "raced"


def register_versions(home: Path, count: int = VERSIONS, **measured: Any) -> None:
    """Versions of a folder without weights, each of a run with a perplexity that is a bit better."""
    from tasks.tracking.client import record_run, register_model

    folder = home / "models" / "raced"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    for number in range(count):
        run_id = record_run(
            home,
            experiment="eigenpress",
            run_name="raced",
            parameters={},
            metrics={"compressed/perplexity": 10.0 - number / 100, **measured},
            artifacts={},
            tags={},
        )
        register_model(
            home,
            name=NAME,
            model_dir=folder,
            run_id=run_id,
            tags={"keys.evaluate": f"key{number}"},
        )


@dataclass(frozen=True)
class Round:
    """What became of one race: the versions that say they won, and the rest of the words."""

    winners: list[int]
    words: list[str]


def race(homes: Sequence[Path], rounds: int) -> list[Round]:
    """Races; both processes have evaluated their gates before either takes the lease.

    Args:
        homes: The data directory of each process.
        rounds: How often.
    """
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(len(homes)), context.Queue()
    asked = [context.Queue() for _ in homes]
    workers = [
        context.Process(target=_work, args=(home, barrier, orders, answers), daemon=True)
        for home, orders in zip(homes, asked, strict=True)
    ]
    for worker in workers:
        worker.start()
    champion, found = 0, []
    for _ in range(rounds):
        others = [number for number in range(1, VERSIONS + 1) if number != champion]
        for orders, number in zip(asked, others, strict=False):
            orders.put(number)
        said = [answers.get(timeout=60) for _ in homes]
        winners = [number for number, won, _ in said if won]
        found.append(Round(winners, [words for _, _, words in said]))
        champion = winners[0] if winners else champion
    for orders, worker in zip(asked, workers, strict=True):
        orders.put(0)
        worker.join()
    return found


def _work(home: Path, barrier: Any, orders: Any, answers: Any) -> None:
    from flows.runs import promotion
    from flows.settings.gates import build_gates
    from tasks.promotion.lease import HeldError

    gates = build_gates({"perplexity": {"max": 20}}, "of the race")
    verdicts = promotion._verdicts

    def meet(*given: Any) -> Any:
        found = verdicts(*given)
        barrier.wait()
        return found

    promotion._verdicts = meet
    while number := orders.get():
        try:
            asked = promotion.Asked(home, NAME, gates, str(number), why=f"pid {os.getpid()}")
            answers.put((number, promotion.promote(asked)["moved"], ""))
        except HeldError as error:
            answers.put((number, False, str(error)))
        except Exception as error:
            answers.put((number, False, f"BROKEN {type(error).__name__}: {error}"))


def check(home: Path, rounds: Sequence[Round]) -> None:
    """Every race had one winner and one who says so, and none is missing in the history."""
    from flows.runs.promotion import history
    from tasks.tracking.versions import read_aliases

    for number, one in enumerate(rounds):
        assert len(one.winners) == 1, (number, one)
        (words,) = [text for text in one.words if text]
        assert "nothing was moved" in words, words
    moves = history(home, NAME)
    assert [move.ending for move in moves] == ["done"] * len(rounds)
    assert [move.move.target for move in moves] == [one.winners[0] for one in rounds]
    assert [move.move.number for move in moves] == list(range(1, len(rounds) + 1))
    assert read_aliases(home, NAME)["champion"] == rounds[-1].winners[0]


@contextmanager
def server(folder: Path, port: int) -> Any:
    """An MLflow server on loopback, two processes of its own that end with it."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)),
            *("--workers", "2", "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"),
            *("--artifacts-destination", str(folder / "artifacts")),
        ],
        env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, 15)
        process.wait()


def main() -> None:
    """As the module says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("rounds", type=int, nargs="?", default=100)
    parser.add_argument("--server", type=int, metavar="PORT")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        settings: list[tuple[str, list[str], str | None]] = [
            ("one data directory", ["a", "a"], None),
            ("two that share a database", ["b", "c"], f"sqlite:///{folder / 'shared.db'}"),
        ]
        for what, names, uri in settings:
            _run(what, [folder / name for name in names], uri, given.rounds)
        if given.server:
            with server(folder, given.server) as uri:
                _run("a tracking server", [folder / "d", folder / "e"], uri, given.rounds)


def _run(what: str, homes: list[Path], uri: str | None, rounds: int) -> None:
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    if uri:
        os.environ["MLFLOW_TRACKING_URI"] = uri
    child = multiprocessing.get_context("fork").Process(target=_one, args=(what, homes, rounds))
    child.start()
    child.join()
    if child.exitcode:
        raise SystemExit(f"{what}: failed")


def _one(what: str, homes: list[Path], rounds: int) -> None:
    prepared = multiprocessing.get_context("fork").Process(
        target=register_versions, args=(homes[0],)
    )
    prepared.start()
    prepared.join()
    begun = time.perf_counter()
    found = race(homes, rounds)
    seconds = time.perf_counter() - begun
    check(homes[0], found)
    words = Counter(text.partition(":")[0][:60] for one in found for text in one.words if text)
    print(f"{what}: {rounds} races, {rounds} winners, {seconds:.0f} s; losers say {dict(words)}")
    for home in homes:
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main()
