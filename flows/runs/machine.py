"""What this machine does in a second, measured for a moment and kept in the data directory."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch

from flows.settings.home import MACHINE as FILE
from storage.disk import writing
from storage.records import NoRecordError, read_record, write_record

FORMAT = 1
OLD = timedelta(days=30)  # after which it is measured again
SIZE = {"cpu": 640, "cuda": 4096}  # of the matrices: large enough for the best rate
EIGEN = 320
LOGITS = (64, 8192)
BYTES = 1 << 24  # written and read
REPEATS = 6
REST = 0.01  # seconds before each repeat: who has slept is let run without interruption
BUSY = 0.5  # load of a core from which the machine is not this process's own
PATIENCE = 1.0  # seconds after which one measure has had repeats enough


@dataclass(frozen=True)
class Machine:
    """Rates, in units per second.

    Attributes:
        products: Dtype to floating-point operations in a matrix product.
        eigen: n³ of a symmetric eigendecomposition (n, n) in float64.
        logits: Logits through a softmax in float64.
        write: Bytes to the data directory, until they are on the disk.
        read: Bytes from it (what was just written: memory may help).
        measured: When, ISO 8601.
    """

    products: dict[str, float]
    eigen: float
    logits: float
    write: float
    read: float
    measured: str


def known_machine(
    home: Path, device: str, dtypes: Sequence[str], threads: int | None = None
) -> Machine:
    """The machine's rates, from the home where they were measured lately for the same set-up.

    Measured again for another device, number of threads or version of torch, for a dtype that is
    not among them, and after 30 days.

    Args:
        home: Data directory; its file ``machine.json`` is written.
        device: "cpu" or "cuda".
        dtypes: Of the products, by torch's names.
        threads: That products are divided among; None for as many as now.
    """
    file = home / FILE
    threads = threads or torch.get_num_threads()
    name = f"{device}, {threads} threads, torch {torch.__version__}"
    kept = _read(file)
    try:
        found = Machine(**kept[name])
        age = datetime.now(UTC) - datetime.fromisoformat(found.measured)
        if age < OLD and set(dtypes) <= set(found.products):
            return found
        dtypes = sorted({*dtypes, *found.products})
    except (KeyError, TypeError, ValueError):  # not there, or of another version's form
        pass
    with _threads(threads):
        found = measure(device, dtypes, home)
    write_record(file, {"format": FORMAT, "machines": kept | {name: asdict(found)}}, indent=1)
    return found


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Products are divided among so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _read(file: Path) -> dict[str, Any]:
    try:
        kept = read_record(file)
    except (FileNotFoundError, NoRecordError):  # none yet, or damaged: it is only measured again
        return {}
    return dict(kept["machines"]) if kept.get("format") == FORMAT else {}


def measure(device: str, dtypes: Sequence[str], folder: Path) -> Machine:
    """Times one product per dtype, an eigendecomposition, a softmax and a file."""
    here = torch.device(device).type == "cpu"
    products = {name: _product(device, name) for name in dtypes}
    half = torch.rand(EIGEN, EIGEN, dtype=torch.float64, device=device)
    gram = half @ half.T
    eigen = EIGEN**3 / best(lambda: float(torch.linalg.eigh(gram)[0][0]), int(here))
    row = torch.rand(LOGITS, device=device)
    took = best(lambda: float(row.double().logsumexp(-1)[0]), int(here))
    logits = row.numel() / took
    payload = os.urandom(BYTES)
    file = folder / f"{FILE}.{os.getpid()}"
    try:
        with writing(file, BYTES):
            write = BYTES / best(lambda: _write(file, payload), 0, 2)
            read = BYTES / best(lambda: file.read_bytes(), 0, 2)
    finally:
        file.unlink(missing_ok=True)
    return Machine(products, eigen, logits, write, read, datetime.now(UTC).isoformat())


def _product(device: str, dtype: str) -> float:
    """Operations per second."""
    kind = torch.device(device).type
    size = SIZE[kind]
    matrix = torch.rand(size, size, device=device).to(getattr(torch, dtype))
    threads = torch.get_num_threads() if kind == "cpu" else 0
    return 2.0 * size**3 / best(lambda: float((matrix @ matrix)[0, 0]), threads)


def _write(file: Path, payload: bytes) -> None:
    with file.open("wb") as handle:
        handle.write(payload)
        handle.flush()
        os.fsync(handle.fileno())


def best(work: Callable[[], object], threads: int = 1, repeats: int = REPEATS) -> float:
    """Seconds of the fastest of a few repeats: other work on the machine only ever adds to it.

    On a busy machine no repeat is left alone. There CPU seconds tell what the clock cannot, where
    ``threads`` share them (none: the work is not the processor's).
    """
    began = time.perf_counter()
    work()  # the first sets threads and libraries up
    walls, used = [], []
    for _ in range(repeats):
        time.sleep(REST)
        started, before = time.perf_counter(), time.process_time()
        work()
        walls.append(time.perf_counter() - started)
        used.append((time.process_time() - before) / max(1, threads))
        if time.perf_counter() - began > PATIENCE:
            break
    return min(walls + used) if threads and _busy() else min(walls)


def _busy() -> bool:
    """Whether others compute here, too."""
    return os.getloadavg()[0] > BUSY * (os.cpu_count() or 1)
