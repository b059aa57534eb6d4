"""Threads share one heap, so that what one leaves free another can use, and so can the system."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COUNT = """
import ctypes, sys, threading
from flows.settings.heap import share_one_heap
if sys.argv[1] == "shared":
    share_one_heap()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
gate = threading.Barrier(4)
def work():
    libc.malloc(ctypes.c_size_t(1000))
    gate.wait()
threads = [threading.Thread(target=work) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
libc.fopen.restype = ctypes.c_void_p
file = ctypes.c_void_p(libc.fopen(sys.argv[2].encode(), b"w"))
libc.malloc_info(0, file)
libc.fclose(file)
"""

FREE = """
import ctypes, psutil
from flows.settings.heap import give_back
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def take(count):
    place = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(count)))
    ctypes.memset(place, 1, count)
    return place
def tell():
    print(psutil.Process().memory_info().rss)
taken = [(take(100_000), take(100)) for _ in range(1000)]
tell()
for large, _ in taken:
    libc.free(large)
tell()
give_back()
tell()
"""


def heaps(tmp_path: Path, how: str, **environment: str) -> int:
    """Heaps of a process whose four threads have each asked for memory."""
    words = [sys.executable, "-c", COUNT, how, str(tmp_path / "heaps.xml")]
    kept = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
    subprocess.run(words, check=True, cwd=ROOT, env=kept | environment)
    return (tmp_path / "heaps.xml").read_text().count("<heap nr=")


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_info"), reason="needs glibc, which has several heaps"
)
def test_threads_share_one_heap_unless_the_user_says_otherwise(tmp_path: Path) -> None:
    assert heaps(tmp_path, "as it comes") > 1
    assert heaps(tmp_path, "shared") == 1
    assert heaps(tmp_path, "shared", MALLOC_ARENA_MAX="3") > 1


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc, which keeps free memory"
)
def test_what_is_free_between_what_is_kept_goes_back() -> None:
    words = [sys.executable, "-c", FREE]
    done = subprocess.run(words, check=True, cwd=ROOT, capture_output=True, text=True)
    full, freed, given_back = map(int, done.stdout.split())
    assert freed > full - 20_000_000  # glibc keeps it
    assert given_back < full - 80_000_000
