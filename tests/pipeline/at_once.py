"""Two flows that begin at the same moment on one store, again and again: who computed what?

`python -m tests.pipeline.at_once 100` lets them begin a hundred times, each time on an empty store.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.patience import PATIENCE
from tests.pipeline import pico


def together(settings: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Walks in a process each, which begin together.

    Returns:
        The keys that each has computed.
    """
    context = multiprocessing.get_context("forkserver")  # what this process runs is not forked
    context.set_forkserver_preload(["tests.pipeline.pico"])
    barrier, answers = context.Barrier(len(settings)), context.Queue()
    processes = [
        context.Process(target=_walk, args=(one, dict(os.environ), barrier, answers), daemon=True)
        for one in settings
    ]
    for process in processes:
        process.start()
    found = [answers.get(timeout=PATIENCE) for _ in processes]
    for process in processes:
        process.join()
    broken = [keys for keys in found if isinstance(keys, str)]
    assert not broken, broken
    return found


def _walk(
    settings: Mapping[str, Any], environment: Mapping[str, str], barrier: Any, answers: Any
) -> None:
    try:
        barrier.wait()
        with pico.environment(environment):
            walk = pico.walk(settings)
        assert not walk.problems, walk.problems
        answers.put([o.key for o in walk.outcomes if o.state == "computed"])
    except BaseException as error:
        answers.put(f"{type(error).__name__}: {error}")


def main() -> None:
    """As the module says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("rounds", type=int, nargs="?", default=100)
    rounds = parser.parse_args().rounds
    begun, shares = time.perf_counter(), Counter[int]()
    with tempfile.TemporaryDirectory() as place:
        inputs = pico.make_inputs(Path(place))
        for number in range(rounds):
            settings = inputs.settings(Path(place) / f"home-{number}")
            made = together([settings, settings])
            twice = [k for k, n in Counter(key for one in made for key in one).items() if n > 1]
            assert not twice, (number, twice)
            assert sum(map(len, made)) == sum(pico.UNITS.values()), (number, list(map(len, made)))
            shares[min(map(len, made))] += 1
    print(
        f"{rounds} times two flows at once, {sum(pico.UNITS.values())} keys each time, every key "
        f"computed once; {time.perf_counter() - begun:.0f} s. Keys of who computed fewer, and how "
        f"often: {dict(sorted(shares.items()))}"
    )


if __name__ == "__main__":
    main()
