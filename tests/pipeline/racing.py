"""Two processes that promote different versions of one model at the same moment, again and again.

`python -m tests.pipeline.racing 100 PORT` races a hundred times in each of three settings: on one
data directory, on two that share a database, and (given a port) through a tracking server. It kills
a promotion with SIGKILL before every one of its writes, too.
"""

import argparse
import importlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from tests.patience import PATIENCE, is_answered, wait_for

VERSIONS = 3
NAME = "raced"


def register_versions(home: Path, count: int = VERSIONS, **measured: Any) -> None:
    """Versions of a folder without weights, each with a perplexity that is a bit better."""
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
        said = [answers.get(timeout=PATIENCE) for _ in homes]
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

    promotion._verdicts = meet  # type: ignore[assignment]
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
        wait_for(lambda: is_answered(f"http://127.0.0.1:{port}/health"), 0.5, process)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, 15)
        process.wait()


DEAR = (  # imported once: children are forks
    "mlflow.store.model_registry.sqlalchemy_store",
    "mlflow.store.tracking.sqlalchemy_store",
    "flows.runs.promotion",
)
WRITES = 7  # of one promotion: its claim twice, the record, two aliases, the ending, the lease away


def kill_between_steps(home: Path) -> list[str]:
    """Promotions that are killed before each of their writes, each followed by one that is not.

    Returns:
        How the record of each ended, or that of the promotion behind it.
    """

    found: list[str] = []
    champion = None
    for number in range(WRITES):
        new = 1 if champion == 2 else 2
        code = _in_child(lambda new=new, number=number: _promote(home, new, number))  # type: ignore[misc]
        assert code == -signal.SIGKILL, (number, code)
        left, healed, endings = _asked(lambda new=new: _look_heal_look(home, new))  # type: ignore[misc]
        assert left.get("champion") in (champion, new), number
        wanted = {"champion": new, "previous": champion}
        assert healed == {alias: v for alias, v in wanted.items() if v is not None}, number
        assert all(endings), (number, endings)
        found.append(endings[-2] if endings[-2:-1] == ["withdrawn"] else endings[-1])
        champion = new
    return found


def _look_heal_look(home: Path, version: int) -> tuple[dict[str, int], dict[str, int], list[str]]:
    """Aliases as a killed promotion left them and as the next leaves them, and all endings."""
    from flows.runs.promotion import history
    from tasks.tracking.registered_model import RegisteredModel

    model = RegisteredModel(home, NAME)
    left = model.aliases()
    _promote(home, version)
    return left, model.aliases(), [one.ending for one in history(home, NAME)]


def _promote(home: Path, version: int, killed_at: int | None = None) -> None:
    from flows.runs import promotion
    from flows.settings.gates import build_gates
    from tasks.tracking.registered_model import RegisteredModel

    writes = count()

    def dying(write: Any) -> Any:
        def written(*given: Any) -> None:
            if next(writes) == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            write(*given)

        return written

    for name in ("set_tag", "delete_tag", "set_alias"):
        setattr(RegisteredModel, name, dying(getattr(RegisteredModel, name)))
    gates = build_gates({"perplexity": {"max": 20}}, "of the test")
    promotion.promote(promotion.Asked(home, NAME, gates, str(version)))


def _in_child(work: Callable[[], Any]) -> int | None:
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    return process.exitcode


def _asked(work: Callable[[], Any]) -> Any:
    """What a child finds: this process opens no database, which its children would inherit."""
    answers = multiprocessing.get_context("fork").SimpleQueue()
    assert _in_child(lambda: answers.put(work())) == 0
    return answers.get()


def main() -> None:
    """As the module says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("rounds", type=int, nargs="?", default=100)
    parser.add_argument("port", type=int, nargs="?", help="of a tracking server to start")
    parser.add_argument("--blank", type=Path, metavar="DIR", help="a data directory to begin with")
    parser.add_argument("--one", action="store_true", help="only on one data directory")
    given = parser.parse_args()
    for module in DEAR:
        importlib.import_module(module)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        settings: list[tuple[str, list[str], str | None]] = [
            ("one data directory", ["a", "a"], None),
            ("two that share a database", ["b", "c"], f"sqlite:///{folder / 'shared.db'}"),
        ]
        if given.blank:
            for name in "ak":
                shutil.copytree(given.blank, folder / name)
        for what, names, uri in settings[: 1 if given.one else None]:
            _run(what, [folder / name for name in names], uri, given.rounds)
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        assert _in_child(lambda: register_versions(folder / "k")) == 0
        print(f"killed before each of {WRITES} writes: {kill_between_steps(folder / 'k')}")
        if given.port:
            with server(folder, given.port) as uri:
                _run("a tracking server", [folder / "d", folder / "e"], uri, given.rounds)


def _run(what: str, homes: list[Path], uri: str | None, rounds: int) -> None:
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    if uri:
        os.environ["MLFLOW_TRACKING_URI"] = uri
    if _in_child(lambda: _one(what, homes, rounds)):
        raise SystemExit(f"{what}: failed")


def _one(what: str, homes: list[Path], rounds: int) -> None:
    assert _in_child(lambda: register_versions(homes[0])) == 0
    begun = time.perf_counter()
    found = race(homes, rounds)
    seconds = time.perf_counter() - begun
    check(homes[0], found)
    words = Counter(text.partition(":")[0][:60] for one in found for text in one.words if text)
    print(f"{what}: {rounds} races, {rounds} winners, {seconds:.0f} s; losers say {dict(words)}")


if __name__ == "__main__":
    main()
