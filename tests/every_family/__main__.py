"""`make families`: tries every family, each in a process of its own, and writes docs/models.md.

Names after the command try those alone and write their rows.
"""

import multiprocessing
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import transformers

from tests.code_cache import code_cache_at
from tests.every_family.page import PAGE, read, render
from tests.every_family.small import model_types
from tests.every_family.trial import Outcome, try_family

SECONDS = 120.0


def _in_child(model_type: str, sender: Connection) -> None:
    with tempfile.TemporaryDirectory() as folder, code_cache_at(Path(folder, "modules")):
        sender.send(try_family(model_type, Path(folder)))


def tried(names: Iterable[str]) -> Iterator[tuple[str, Outcome]]:
    """What becomes of each family, one process at a time, which may end or hang as it likes."""
    fork = multiprocessing.get_context("fork")  # a new interpreter would import for seconds
    for name in names:
        receiver, sender = fork.Pipe(duplex=False)
        child = fork.Process(target=_in_child, args=(name, sender))
        child.start()
        sender.close()
        outcome = Outcome("fault", f"no answer in {SECONDS:.0f} s")
        try:
            if receiver.poll(SECONDS):
                outcome = receiver.recv()
        except EOFError:
            outcome = Outcome("fault", "its process ended")
        child.kill()
        child.join()
        yield name, outcome


def main() -> None:
    """Tries what was named, or everything; ends with 1 where something is at fault."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    version, outcomes = read()
    if not sys.argv[1:] or version != transformers.__version__:
        outcomes = {}
    for name, outcome in tried(sys.argv[1:] or model_types()):
        print(f"{name}: {outcome.state} {outcome.why}", flush=True)
        outcomes[name] = outcome
    PAGE.write_text(render(outcomes), encoding="utf-8")
    sys.exit(any(outcome.state == "fault" for outcome in outcomes.values()))


if __name__ == "__main__":
    main()
