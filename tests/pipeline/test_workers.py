"""Runs that several processes compute, of this machine, of Dask and of Ray, and flows at once."""

import re
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import obstore
import psutil
import pytest

from flows.runs.hands import LOST
from storage.records import unseal
from storage.store import Store
from tests.patience import wait_for
from tests.pipeline import at_once, pico
from tests.s3_server import Server

TOTAL = sum(pico.UNITS.values())


def digests(home: Path) -> dict[tuple[str, str], str]:
    found = Store(home / "store").manifests()
    return {(m.stage, m.unit): m.digest for m in found if m.stage != "scratch"}


def finish(process: Any) -> dict[str, Any]:
    result, err = pico.finish(process)
    assert "\nnote  " not in err.replace(f"note         {LOST[:30]}", "")
    return result


def test_ray_makes_what_one_process_makes(
    inputs: pico.Inputs,
    prepared_home: Path,
    home: Path,
    cold_walk: pico.Walk,
    tmp_path: Path,
) -> None:
    pytest.importorskip("prefect_ray", reason="the extra is not installed on this platform")
    shutil.copytree(prepared_home, home)
    settings = inputs.settings(home, runner="ray", workers=2)
    result = finish(pico.start([*pico.arguments("run", settings), "--json"], tmp_path))
    assert pico.counts(result["stages"], "computed") == {**pico.UNITS, "register": 1}
    assert digests(home) == cold_walk.digests
    assert pico.scratch_left(home / "store") == []
    assert list((home / "store" / "leases").iterdir()) == []
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(home) in str(p.info["cmdline"])]


@contextmanager
def counted_puts() -> Iterator[Counter[str]]:
    """Names of what is put into buckets of the server in this process, and how often."""
    from moto.s3.models import S3Backend

    puts: Counter[str] = Counter()
    put = S3Backend.put_object

    def counting(self: Any, bucket_name: str, key_name: str, *args: Any, **more: Any) -> Any:
        puts[key_name] += 1
        return put(self, bucket_name, key_name, *args, **more)

    S3Backend.put_object = counting  # type: ignore[method-assign]
    try:
        yield puts
    finally:
        S3Backend.put_object = put  # type: ignore[method-assign]


def holder_of_a_lease(home: Path) -> int | None:
    """A process that computes a layer's decomposition at this moment."""
    for file in (home / "store" / "leases").glob("*"):
        try:
            found = re.search(r"process (\d+)", file.read_text())
        except FileNotFoundError:
            continue
        if found and len(list((home / "store").glob("decompose/*/*/manifest.json"))) >= 2:
            return int(found[1])
    return None


def test_one_of_two_dask_workers_is_killed(
    s3: Server,
    inputs: pico.Inputs,
    prepared_home: Path,
    home: Path,
    cold_walk: pico.Walk,
    tmp_path: Path,
) -> None:
    """The store is a bucket; every key is put there once, and what one process makes.

    Of the unit in hand the bytes may lie there twice: another process found it on the disk.
    """
    shutil.copytree(prepared_home, home)
    address = s3.address()
    settings = inputs.settings(home, runner="dask", workers=2, store=address)
    words = [*pico.arguments("run", settings), "--json"]
    with counted_puts() as puts:
        process = pico.start(words, tmp_path, **s3.environment)
        pid = wait_for(lambda: holder_of_a_lease(home), 0.002, process)
        assert process.poll() is None, process.communicate()
        worker = psutil.Process(pid)
        assert process.pid in {parent.pid for parent in worker.parents()}
        worker.send_signal(signal.SIGKILL)
        result = finish(process)
    assert digests(home) == cold_walk.digests
    assert pico.scratch_left(home / "store") == []
    states = {s["key"] for s in result["stages"] if s["name"] != "register"}
    prefix = address.partition("//")[2].partition("/")[2]
    manifests = {name: n for name, n in puts.items() if name.startswith(f"{prefix}/manifests/")}
    assert {name.rpartition("/")[2] for name in manifests} == states
    assert set(manifests.values()) == {1}
    payloads = Counter(name.split("/")[-2] for name in puts if f"{prefix}/payload/" in name)
    assert payloads.total() <= len(payloads) + 1
    assert len(states) == TOTAL
    left = [name for name in s3.names(address) if name.startswith("leases/")]
    texts = [bytes(obstore.get(s3.raw(), f"{prefix}/{name}").bytes()) for name in left]
    assert {unseal(text)["pid"] for text in texts} <= {pid}  # of units that it had finished
    with pico.environment(pico.clean_environment(**s3.environment)):
        assert pico.walk(inputs.settings(home, store=address)).computed == {}


@pytest.mark.parametrize("shared", [False, True], ids=["one home", "two homes and a bucket"])
def test_two_flows_at_once_compute_every_key_once(
    shared: bool, s3: Server, inputs: pico.Inputs, tmp_path: Path, cold_walk: pico.Walk
) -> None:
    for number in range(2):
        homes = [tmp_path / f"{number}-{place if shared else 0}" for place in range(2)]
        more = {"store": s3.address()} if shared else {}
        with pico.environment(pico.clean_environment(**s3.environment)):
            settings = [inputs.settings(home, **more) for home in homes]
            made = at_once.together(settings)
        assert Counter(key for one in made for key in one) == Counter(cold_walk.keys.values())
        assert digests(homes[0]) == cold_walk.digests
